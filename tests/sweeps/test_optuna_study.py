"""Optuna chooses the values of a sweep, and a study in a storage is continued."""

import pytest

from support.commands import SHORT_ROWS_RUN

optuna = pytest.importorskip("optuna")
SEARCH = [
    "-m",
    *SHORT_ROWS_RUN,
    "+sweep=optuna",
    "~hydra.sweeper.params",
    "trainer.learning_rate=tag(log,interval(1e-4,1e-2))",
]


@pytest.fixture
def tried(monkeypatch):
    """The learning rate of each job that was run; its objective is the rate, or what the function in `answer` says."""
    rates = []

    def job(config, folder):
        rates.append(config.trainer.fields["learning_rate"])
        (folder / "metrics.json").write_text(f'{{"train_loss": {rates[-1]}}}')
        return rates[-1]

    monkeypatch.setattr("sft_recipes.train.main", job)
    return rates


def test_values_are_chosen_within_their_interval_by_what_is_typed(command, tried):
    code, printed, _ = command(*SEARCH, "hydra.sweeper.n_trials=3", "hydra.sweep.dir=sweep")
    assert code == 0 and len(set(tried)) == 3 and all(1e-4 <= rate <= 1e-2 for rate in tried)
    assert "3 of 3 jobs finished. Sorted by train_loss, the lowest first." in printed


@pytest.mark.skipif(int(optuna.__version__[0]) < 4, reason="Optuna 2's storage needs SQLAlchemy below 2")
def test_a_study_in_a_storage_is_continued_with_other_values_in_other_folders(command, tried, tmp_path):
    typed = [*SEARCH, "hydra.sweeper.storage=sqlite:///study.db", "hydra.sweep.dir=sweep"]
    command(*typed, "hydra.sweeper.n_trials=2")
    first = {path: path.read_bytes() for path in tmp_path.glob("sweep/*/metrics.json")}
    _, printed, said = command(*typed, "hydra.sweeper.n_trials=4")
    assert "2 done so far" in said and "4 of 4 jobs finished." in printed
    assert len(set(tried)) == 4 and len(first) == 2 and {path: path.read_bytes() for path in first} == first
    study = optuna.load_study(study_name=None, storage="sqlite:///study.db")
    assert [trial.value for trial in study.trials] == tried


@pytest.mark.skipif(int(optuna.__version__[0]) < 4, reason="Optuna 2's storage needs SQLAlchemy below 2")
def test_a_trial_that_broke_off_is_run_first_in_its_folder(command, tmp_path, tried, monkeypatch):
    typed = [*SEARCH, "hydra.sweeper.storage=sqlite:///study.db", "hydra.sweep.dir=sweep", "hydra.sweeper.n_trials=2"]
    job = __import__("sft_recipes.train").train.main

    def stopped(config, folder):
        tried.append(config.trainer.fields["learning_rate"])
        raise KeyboardInterrupt

    monkeypatch.setattr("sft_recipes.train.main", stopped)
    assert command(*typed)[0] == 130
    monkeypatch.setattr("sft_recipes.train.main", job)
    assert command(*typed)[0] == 0
    assert tried[0] == tried[1] != tried[2]
    assert sorted(path.name for path in (tmp_path / "sweep").glob("[0-9]*")) == ["0", "1"]


@pytest.mark.skipif(int(optuna.__version__[0]) < 4, reason="Optuna 2's storage needs SQLAlchemy below 2")
def test_values_of_another_kind_than_the_study_s_are_refused_and_leave_no_trial(command, tried):
    typed = [*SEARCH[:-1], "hydra.sweeper.storage=sqlite:///study.db", "hydra.sweep.dir=sweep"]
    key = "trainer.learning_rate"
    command(*typed, "hydra.sweeper.n_trials=1", f"{key}=tag(log,interval(1e-4,1e-2))")
    for other in ("interval(1e-4,1e-2)", "choice(1e-4,1e-2)"):
        code, _, said = command(*typed, "hydra.sweeper.n_trials=2", f"{key}={other}")
        assert code == 2 and said.splitlines()[-1].startswith(f"{key}=") and "study_name=NAME" in said
    assert command(*typed, "hydra.sweeper.n_trials=2", f"{key}=tag(log,interval(1e-3,1e-1))")[0] == 0
    assert len(tried) == 2 and 1e-3 <= tried[1] <= 1e-1


@pytest.mark.parametrize(
    ("typed", "kinds"), [("seed=choice(1,2)", {1, 2}), ("seed=range(1,4)", {1, 2, 3, 4}), ("seed=3,4", {3, 4})]
)
def test_choices_and_ranges_give_their_values(command, monkeypatch, typed, kinds):
    seeds = []
    monkeypatch.setattr("sft_recipes.train.main", lambda config, _: seeds.append(config.seed) or 0.0)
    rest = [
        "~hydra.sweeper.params",
        "hydra.sweeper.n_trials=6",
        "hydra.sweep.dir=sweep",
        "hydra.sweeper.sampler.name=RandomSampler",
    ]
    assert command("-m", *SHORT_ROWS_RUN, "+sweep=optuna", *rest, typed)[0] == 0
    assert len(seeds) > 2 and set(seeds) <= kinds and len(set(seeds)) > 1


@pytest.mark.skipif(int(optuna.__version__[0]) < 4, reason="Optuna 2's storage needs SQLAlchemy below 2")
def test_a_direction_and_a_name_of_ones_own_are_the_study_s(command, tried):
    storage = "sqlite:///study.db"
    typed = [f"hydra.sweeper.storage={storage}", "hydra.sweeper.study_name=mine", "hydra.sweeper.direction=maximize"]
    assert command(*SEARCH, *typed, "hydra.sweeper.n_trials=1", "hydra.sweep.dir=sweep")[0] == 0
    assert optuna.load_study(study_name="mine", storage=storage).direction.name == "MAXIMIZE"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("hydra.sweeper.storage=sqlit:///study.db", "hydra.sweeper.storage=sqlit:///study.db: Can't load plugin: "),
        ("hydra.sweeper.sampler.name=TPESample", "hydra.sweeper.sampler.name=TPESample is no sampler of Optuna's. Did you mean TPESampler?"),
        ("+hydra.sweeper.sampler.n_startup=3", "hydra.sweeper.sampler.n_startup is not a field of TPESampler. Did you mean n_startup_trials?"),
    ],
)  # fmt: skip
def test_what_optuna_does_not_have_is_said_in_one_line(command, typed, said):
    code, _, printed = command(*SEARCH, "hydra.sweep.dir=sweep", typed)
    assert code == 2 and printed.splitlines()[-1].startswith(said)


def test_a_number_of_trials_that_is_none_is_one_line(command, tried):
    code, _, said = command(*SEARCH, "hydra.sweeper.n_trials=many", "hydra.sweep.dir=sweep")
    assert (code, said, tried) == (2, "hydra.sweeper.n_trials should be a whole number, not 'many'.\n", [])
