"""The command `opdctl`, and `python -m opdctl`."""

import atexit

from opdctl import signals


def main() -> None:
    """Run the command line. Until a command handles signals, they end the process without a traceback of an import."""
    signals.install_handlers()
    atexit.register(signals.ignore_signals)
    from opdctl.cli.main import main as run_command_line

    run_command_line()


if __name__ == "__main__":  # a spawned process may import this module
    main()
