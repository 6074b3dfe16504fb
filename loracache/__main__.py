# SPDX-License-Identifier: Apache-2.0
"""`python -m loracache` is `loracache`."""

from loracache.cli.app import main

if __name__ == "__main__":
    main()
