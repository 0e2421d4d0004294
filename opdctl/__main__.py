"""The command `opdctl`, and `python -m opdctl`."""

import atexit

from opdctl import garbage_collection, signals


def main() -> None:
    """Run the command line. Until a command handles signals, they end the process without a traceback of an import."""
    signals.install_handlers()
    garbage_collection.defer_collections()  # until `set_up_device`, after which a command imports little
    atexit.register(signals.ignore_signals)
    from opdctl.cli.main import main as run_command_line

    run_command_line()


if __name__ == "__main__":  # a spawned process may import this module
    main()
