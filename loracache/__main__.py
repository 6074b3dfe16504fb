"""`python -m loracache` is `loracache`."""

from loracache.cli import main

if __name__ == "__main__":
    main()
