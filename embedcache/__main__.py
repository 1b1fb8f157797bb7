"""python -m embedcache"""

from embedcache.cli.main import main

if __name__ == "__main__":  # a spawned process imports this file too
    main()
