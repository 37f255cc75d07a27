"""What the pipeline knows of each data set: its raw files, columns, units, and which rows are history and targets."""

from __future__ import annotations

from dataclasses import dataclass as _dataclass
from dataclasses import replace

from etl.errors import StageError

SIMULATED_MARKER = "SIMULATED.json"  # written by the simulator beside the logs it makes


@_dataclass(frozen=True)
class DatasetDefinition:
    """One data set.

    Attributes:
        name: its name in the warehouse, in MLflow and in the attempt.
        log_globs: files with one raw row an exposure.
        user_glob, item_glob: files with one raw row a user / an item; may match nothing.
        log_columns: the exact header of the logs.
        feedback_fields: raw 0/1 columns; bit i of `feedback` is field i.
        label_field: the feedback field that is the label of a target.
        user_fields: raw columns of the user file that the model sees.
        year: the year of the file names' dates (they carry month and day).
        simulated: rows come from the simulator; shown wherever the name is.
    """

    name: str
    log_globs: tuple[str, ...]
    user_glob: str
    item_glob: str
    log_columns: tuple[str, ...]
    feedback_fields: tuple[str, ...]
    label_field: str
    user_fields: tuple[str, ...]
    year: int
    simulated: bool = False

    @property
    def label_bit(self) -> int:
        return self.feedback_fields.index(self.label_field)


KUAIRAND_LOG_COLUMNS = (
    "user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment", "is_forward",
    "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter",
    "is_rand", "tab",
)  # fmt: skip

KUAIRAND = DatasetDefinition(
    name="kuairand",
    log_globs=("log_standard_*.csv", "log_standard_*.csv.gz", "log_random_*.csv", "log_random_*.csv.gz"),
    user_glob="user_features_*",
    item_glob="video_features_basic_*",
    log_columns=KUAIRAND_LOG_COLUMNS,
    feedback_fields=("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "is_profile_enter"),
    label_field="is_click",
    user_fields=("user_active_degree", "is_video_author", "follow_user_num_range", "fans_user_num_range",
                 "friend_user_num_range", "register_days_range", "onehot_feat0", "onehot_feat1"),
    year=2022,
)

DATASETS = {
    "kuairand": KUAIRAND,
    # The same layout, written by the simulator; a name of its own keeps its tables and models apart from real ones.
    "kuairand_simulated": replace(KUAIRAND, name="kuairand_simulated", simulated=True),
}


def dataset(name: str) -> DatasetDefinition:
    """Return a definition by name.

    Raises:
        StageError: no such data set.
    """
    if name not in DATASETS:
        raise StageError(f"unknown data set {name!r}", f"use one of: {', '.join(sorted(DATASETS))}")
    return DATASETS[name]
