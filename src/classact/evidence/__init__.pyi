from .claims import evaluate_claims
from .comparison import Comparison, Task, compare_methods
from .executors import Job, run_jobs
from .experiment import Experiment
from .statistics import (
    Interval,
    bootstrap_groups,
    corrected_interval,
    detectable_effect,
    holm,
    t_interval,
    verdict,
)
from .store import Store, StudyError

__all__ = [
    "Comparison",
    "Experiment",
    "Interval",
    "Job",
    "Store",
    "StudyError",
    "Task",
    "bootstrap_groups",
    "compare_methods",
    "corrected_interval",
    "detectable_effect",
    "evaluate_claims",
    "holm",
    "run_jobs",
    "t_interval",
    "verdict",
]
