"""Where the YAML lives: the search path, the open groups and our resolvers."""

import shutil
import textwrap
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from sft_recipes.config.nested_values import iterate_leaves, load_yaml

# Groups that take keys which their files do not list: trl.SFTConfig has 135 fields, and 135 copied ones would rot
OPEN_GROUPS = ("model", "data", "formatter", "adapter", "trainer", "evaluate", "curation")
OURS = "hydra_plugins.sft_recipes_sweeps"
PRIMARY_CONFIGS = ("config", "demo", "generate", "saved_run")  # ours; a user names others with -cn


def config_folder(name: str) -> Path:
    """`conf` or `recipes`: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next((path for path in (package / name, package.parent / name) if path.is_dir()), package / name)


def terminal_width(most: int = 100) -> int:
    """The columns to print in, `most` of them where there is no terminal."""
    return min(most, shutil.get_terminal_size((most, 24)).columns)


def list_choices() -> str:
    """The groups and their options for --help; those of recipes/ are added with a +, the others chosen."""
    loader = GlobalHydra.instance().config_loader()
    width, lines = terminal_width(), []
    for group in sorted(set(loader.list_groups("")) - {"hydra"}, key=lambda name: (name not in OPEN_GROUPS, name)):
        label = f"  {group}=" if group in OPEN_GROUPS else f"  +{group}="
        text = ", ".join(sorted(loader.get_group_options(group)))
        lines.append(textwrap.fill(text, width, initial_indent=label.ljust(14), subsequent_indent=" " * 14))
    return "\n".join(lines)


def read_source_values(name: str) -> DictConfig:
    """By dotted key what the source of recipes/recipe/NAME.yaml says: what the recipe sets, with exceptions.

    A departure `{source: …, why: …}` gives the source's value; what `unknown` begins with is ours, as is the division
    of a step's rows among devices and accumulated steps; `effective_batch_size` is those rows.
    """
    recipe = load_yaml(config_folder("recipes") / "recipe" / f"{name}.yaml")
    groups = {key: recipe[key] for key in ("model", "data", "adapter", "trainer", "seed") if key in recipe}
    values = dict(iterate_leaves(groups))  # evaluation, preview and names are ours
    if "trainer.effective_batch_size" in values:
        values["effective_batch_size"] = values.pop("trainer.effective_batch_size")
        values.pop("trainer.per_device_train_batch_size", None)
        values.pop("trainer.gradient_accumulation_steps", None)
    unknown, departures = recipe["provenance"]["unknown"], recipe["provenance"]["departures"]
    ours = {key for text in unknown for key in text.split(" (")[0].replace(",", " ").split()}
    ours |= {key for key, departure in departures.items() if not isinstance(departure, dict)}
    values |= {key: departure["source"] for key, departure in departures.items() if isinstance(departure, dict)}
    # no plain dict, which `--cfg job --resolve` could not put in place of an interpolation
    return DictConfig({key: value for key, value in values.items() if key not in ours and value is not None})


class RecipesSearchPath(SearchPathPlugin):
    """Adds recipes/ to what Hydra searches, and conf/ behind a folder that -cp put in its place."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if all(element.path != str(config_folder("conf")) for element in search_path.get_path()):
            search_path.append("sft_recipes.conf", f"file://{config_folder('conf')}")
        search_path.append("sft_recipes", f"file://{config_folder('recipes')}")


def register_with_hydra() -> None:
    """Tells Hydra of our resolvers, the second config root, and the groups that take any key: we check those."""
    named = (*OPEN_GROUPS, "data_checks", "mix", "preview", "generate")
    # Hydra locks what it has composed, so that another key needs a +; what is merged into an unlocked node stays open
    open_groups = {group: DictConfig({}, flags={"struct": False}) for group in named}
    ConfigStore.instance().store(name="open_groups", node=DictConfig(open_groups), provider="sft_recipes")
    Plugins.instance().register(RecipesSearchPath)
    for group, choices in load_yaml(Path(__file__).with_name("plugins.yaml")).items():
        for name, node in choices.items():  # stored, since a file in conf/ would be merged with Hydra's own of its name
            ConfigStore.instance().store(group=group, name=name, node=node, provider="sft_recipes")
    # replace: a process that runs several commands, as tests and joblib's workers do, comes here each time
    OmegaConf.register_new_resolver("choices", list_choices, replace=True)
    OmegaConf.register_new_resolver("source_values", read_source_values, replace=True)
    OmegaConf.register_new_resolver("package", lambda path: str(Path(__file__).parents[1] / path), replace=True)


def addable_groups(user_folder: str | None = None) -> list[str]:
    """The groups that a + adds: those of recipes/, and those that the user's `-cd` folder has beside ours."""
    folders = [config_folder("recipes"), *([Path(user_folder)] if user_folder else [])]
    # by the folders' names and not by Hydra, which cannot be asked before it has read the command that this checks
    found = {path.name for parent in folders if parent.is_dir() for path in parent.iterdir() if path.is_dir()}
    return sorted(found - set(OPEN_GROUPS))
