"""python -m embedcache"""

from embedcache.cli.main import main

main()
