"""A run's or a sweep's folder as a report, or two runs compared: `python -m sft_recipes.report outputs/lima/<date>`."""

import argparse
from pathlib import Path

from sft_recipes.errors import ConfigError, exit_on_user_error, explained_files_of
from sft_recipes.reporting.run_report import compare_runs, write_report
from sft_recipes.reporting.sweep_report import is_sweep, write_sweep_report


def main(arguments: list[str] | None = None) -> None:
    """Writes the report of a run's or sweep's folder again and prints its table; two runs are compared."""
    parser = argparse.ArgumentParser(prog="python -m sft_recipes.report", description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="outputs/NAME/DATE; two of them are compared")
    parser.add_argument("--price-per-hour", type=float, help="of the machine: the report says what the training cost")
    options = parser.parse_args(arguments)
    folders, price = options.folder, options.price_per_hour
    if price is not None and not 0 <= price < float("inf"):
        parser.error(f"--price-per-hour should be a number of at least 0, not {price}")
    with exit_on_user_error(), explained_files_of(folders[0]):
        if len(folders) > 2:
            raise ConfigError("One folder is reported, two are compared; more are not.")
        if len(folders) == 2:
            print(compare_runs(*folders))
        elif is_sweep(*folders):
            print(write_sweep_report(*folders))
        else:
            print(write_report(*folders, price))


if __name__ == "__main__":
    main()
