"""`python -m loracache` is `loracache`."""

from loracache.cli.app import main

if __name__ == "__main__":
    main()
