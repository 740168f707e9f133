"""The recipes, and what one of them changes in its source: `python -m sft_recipes.recipes [NAME]`."""

import argparse

from hydra import compose

from sft_recipes.config.compose import hydra_initialized
from sft_recipes.config.hydra_plugin import config_folder, terminal_width
from sft_recipes.config.schema import Config, from_hydra
from sft_recipes.errors import ConfigError, did_you_mean, exit_on_user_error
from sft_recipes.reporting.provenance import compare_with_source
from sft_recipes.reporting.setup_sections import describe_method
from sft_recipes.reporting.text import fit_cell, render_table


@exit_on_user_error()
def main(arguments: list[str] | None = None) -> None:
    """Lists the recipes; with a name, shows the source's values beside ours."""
    parser = argparse.ArgumentParser(prog="python -m sft_recipes.recipes", description=main.__doc__)
    parser.add_argument("name", nargs="?", help="a recipe of the list")
    name = parser.parse_args(arguments).name
    if name and name not in recipe_names():
        raise ConfigError(f"There is no recipe={name}.{did_you_mean(name, recipe_names())}")
    lines = list_recipes([name] if name else recipe_names())
    while len(render_table(lines)[0]) > terminal_width(250):
        lines = [row[:-1] for row in lines]
    lines = render_table(lines)
    print("\n".join([*lines, "", *recipe_page(compose_recipe(name))] if name else lines))


def recipe_names() -> list[str]:
    """Every recipe that ships with the package."""
    return sorted(path.stem for path in (config_folder("recipes") / "recipe").glob("*.yaml"))


def compose_recipe(name: str, *overrides: str) -> Config:
    """What `+recipe=NAME` runs."""
    with hydra_initialized():
        return from_hydra(compose("config", [f"+recipe={name}", *overrides]))


def list_recipes(chosen: list[str]) -> list[list[str]]:
    """A row a recipe, under a head: what a narrow terminal leaves out stands last."""
    rows = [["recipe", "model", "adapter", "GiB", "data", "source"]]
    for name in chosen:
        config = compose_recipe(name)
        source = config.provenance.source.removeprefix("https://").split(",")[0]
        # of a list the hub's owners are left out, for a terminal of 80 columns
        model = config.model.id if len(chosen) == 1 else config.model.id.rpartition("/")[2]
        model, method = "the embedded one" if name == "tiny" else model, describe_method(config.composed["adapter"])
        memory = config.provenance.needs.removesuffix(", estimated").removesuffix(" GiB")
        rows.append([name, model, method, memory, fit_cell(", ".join(config.sources), 36), fit_cell(source, 50)])
    return rows


def recipe_page(config: Config) -> list[str]:
    """The source's values beside the recipe's, then what the source does not say."""
    provenance, data = config.provenance, config.provenance.data
    lines = [f"Source: {provenance.source} (confidence {provenance.confidence})", ""]
    lines += render_table(compare_with_source(config.composed))
    lines += ["", *(f"Not said by the source: {what}." for what in provenance.unknown)]
    rows = f"{data['rows']:,} rows" if data.get("rows") else "rows unknown"
    facts = {"data": f"{data['id']}, {rows}, licence: {data['licence']}"}
    facts |= {"machine": provenance.machine, "cost": provenance.cost, "published": provenance.published}
    lines += ["", *(f"{label.capitalize()}: {text}." for label, text in facts.items() if text)]
    return lines


if __name__ == "__main__":
    main()
