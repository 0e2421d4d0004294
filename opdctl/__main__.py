"""python -m opdctl"""

from opdctl.cli.main import main

main()
