"""python -m opdctl"""

from opdctl.cli import main

main()
