"""What a command of ours imports sooner or later, imported once in the fork server of `support.processes`.

Not `sft_recipes.__main__`: a child runs that anew, as `python -m sft_recipes` does.
"""

import gc
import os
import sys
from importlib import import_module

before = set(os.environ)
for verb in ("train", "preview", "evaluate", "curate", "generate", "report", "chat", "merge", "training.lr_finder"):
    import_module(f"sft_recipes.{verb}")
for late in (  # within functions, ours or a library's
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher",
    "hydra._internal.logging_config",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "mpl_toolkits.mplot3d",
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "PIL.BmpImagePlugin",
    "rouge_score.rouge_scorer",
    "sacrebleu",
):
    import_module(late)
for escaping in (False, True):
    templates = import_module("sft_recipes.reporting.document").load_environment(escaping)
    for name in templates.list_templates(["jinja"]):
        templates.get_template(name)  # it is compiled once
import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")  # and this is built once
import_module("sft_recipes.curation.filters").load_detector()  # the file of its model takes 0.7 s to read
SET_BY_IMPORTS = {name: os.environ[name] for name in os.environ.keys() - before}
added = {"", *os.environ["PYTHONPATH"].split(os.pathsep)}
PATHS = [path for path in sys.path if path not in added]  # where any interpreter of this environment looks
gc.collect()
gc.freeze()  # or the first collection in a child would copy every page of it
