"""python -m opdctl"""

from opdctl.cli.main import main

if __name__ == "__main__":  # a spawned process may import this module
    main()
