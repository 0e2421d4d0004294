"""The command `opdctl`, and `python -m opdctl`."""

import signal


def main() -> None:
    """Run the command line. Until a command handles Ctrl-C, it ends the process without a traceback of an import."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from opdctl.cli.main import main as run_command_line

    run_command_line()


if __name__ == "__main__":  # a spawned process may import this module
    main()
