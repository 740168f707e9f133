"""A run's or a sweep's folder as a report, or two runs compared: `python -m sft_recipes.report outputs/lima/<date>`."""

import argparse
import sys
from pathlib import Path

from sft_recipes.errors import ConfigError
from sft_recipes.reporting.run_report import compare_runs, write_report
from sft_recipes.reporting.sweep_report import is_sweep, write_sweep_report


def main(arguments: list[str] | None = None) -> None:
    """Writes the report of a run's folder again and prints its table; two folders are compared."""
    parser = argparse.ArgumentParser(prog="python -m sft_recipes.report", description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="outputs/NAME/DATE; two of them are compared")
    parser.add_argument("--price-per-hour", type=float, help="of the machine: the report says what the training cost")
    options = parser.parse_args(arguments)
    if len(options.folder) == 1 and is_sweep(*options.folder):
        print(write_sweep_report(*options.folder))
        return
    if len(options.folder) > 2:
        sys.exit("One folder is reported, two are compared; more are not.")
    try:
        print(
            write_report(*options.folder, options.price_per_hour)
            if len(options.folder) == 1
            else compare_runs(*options.folder)
        )
    except ConfigError as error:
        sys.exit(str(error))
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # values that no run writes
        sys.exit(f"{options.folder[0]}: its files do not hold what a run writes: {type(error).__name__}, {error}.")


if __name__ == "__main__":
    main()
