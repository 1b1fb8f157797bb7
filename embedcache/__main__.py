"""python -m embedcache"""

from embedcache.cli.main import main

if __name__ == "__main__":  # spawned processes import this file too
    main()
