"""Every plot is a PNG, also of the smallest input."""

from mlplatform.records import TrialResult, TuningResult
from mlplatform.training import plots

PNG = b"\x89PNG\r\n\x1a\n"


def test_learning_curves_of_one_round():
    assert plots.learning_curves({"train_log_loss": [0.5]}, 1).startswith(PNG)


def test_feature_importance_shows_the_largest_of_many():
    assert plots.feature_importance({f"feature_{i}": i / 100 for i in range(80)}).startswith(PNG)
    assert plots.feature_importance({}).startswith(PNG)


def test_the_history_of_a_study_with_pruned_trials():
    trials = (TrialResult(0, 0.5, "complete", {}), TrialResult(1, None, "pruned", {}), TrialResult(2, 0.4, "complete", {}))
    assert plots.optimization_history(TuningResult("m", "study", "log_loss", 0.4, {}, trials)).startswith(PNG)
