"""`python -m tokenspeed`: the command line without its script."""

from tokenspeed.cli import main

if __name__ == "__main__":
    main()
