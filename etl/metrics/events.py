"""The metrics of a day of events: of the day itself (`measure.events.EventsDay`), and against the days before
(`EventsCompared`)."""

from __future__ import annotations

from etl.metrics import panels
from etl.metrics.record import (
    CRITICAL,
    INFO,
    NAN,
    WARNING,
    Bound,
    Limit,
    Metric,
    Suite,
    between,
    graded,
    most,
    share,
    warn,
    zero,
)

# Of the values of a field, also where they are of items.
NEW_CATEGORY_SHARE = Bound("drift.new_category_share", 0.005)
FIELD_PSI = Bound("drift.field_psi_warning", 0.25)
# The rate over the trailing median; also of the targets of sequences.
LABEL_RATE_RATIO = between(
    Bound("drift.label_rate_ratio_warning", (0.75, 1.33)), Bound("drift.label_rate_ratio_critical", (0.6, 1.67))
)

_WATCH_RATIO = Bound("drift.watch_ratio", (0.5, 2.0))

REBUILD = "rebuild the stage with a new attempt; if it fails again, the job that built it has a bug"
_RAW = "look at the raw files of the day and at the reasons in table quarantine; then rebuild with a new attempt"
_ARRIVED = "check that the raw logs of the day have arrived"
_LOGGING = (
    "ask the makers of the logs what has changed; if the change is meant, raise the threshold, else have the day"
    " delivered again"
)
_ZONE = (
    "check the clock and the time zone of the raw times (events.time of the definition), then have the day"
    " delivered again"
)
_IDS = (
    "check how user and item ids are made: they no longer mean what they meant the day before; then have the day"
    " delivered again"
)

_CONTRACT = (
    Metric(
        "null_count",
        lambda day: day.nulls,
        "No column of the contract has nulls.",
        REBUILD,
        zero(contract=True),
        plant="SELECT * REPLACE (nullif(context, 1) AS context) FROM t",
    ),
    Metric(
        "negative_count",
        lambda day: day.negatives,
        "Ids, watch times and durations are not negative.",
        REBUILD,
        zero(contract=True),
        plant="SELECT * REPLACE (-1 - watch_time_ms AS watch_time_ms) FROM t",
    ),
    Metric(
        "context_out_of_range_count",
        lambda day: day.below("context", -1),
        "Contexts are -1 (unknown) or more.",
        REBUILD,
        zero(contract=True),
        plant="SELECT * REPLACE (-2 AS context) FROM t",
    ),
    Metric(
        "unreconciled_count",
        lambda day: abs(day.rows_read - day.rows - day.duplicates - day.quarantined),
        "Raw rows read = events + duplicates + quarantined.",
        REBUILD,
        zero(contract=True),
        plant="SELECT * FROM t OFFSET 1",
    ),
    Metric(
        "manifest_rows_difference_count",
        lambda day: abs(day.counts.get("events", 0) - day.rows),
        "The manifest's count of events is the table's.",
        REBUILD,
        zero(contract=True),
        plant="SELECT * FROM t OFFSET 1",
    ),
    Metric(
        "quarantine_rows_difference_count",
        lambda day: abs(day.quarantine_rows - day.quarantined),
        "Every quarantined row is in table quarantine.",
        REBUILD,
        zero(contract=True),
    ),
    Metric(
        "outside_day_count",
        lambda day: day.outside_day,
        "Every event is of its partition's UTC day.",
        REBUILD,
        zero(contract=True),
        plant="SELECT * REPLACE (event_time_ms + 86400000 AS event_time_ms) FROM t",
    ),
    Metric(
        "feedback_out_of_range_count",
        lambda day: day.unknown_feedback,
        "No feedback bit is set that the data set does not define.",
        REBUILD,
        zero(contract=True),
        plant="SELECT * REPLACE (4096 AS feedback) FROM t",
    ),
)

_ROWS = (
    Metric(
        "lost_day_count",
        lambda day: day.rows == 0 and (day.is_partition_day or day.rows_read > 0),
        "The partition's day has events, and so has every day with raw rows.",
        _ARRIVED,
        zero(),
        plant="SELECT * FROM t WHERE false",
    ),
    Metric(
        "rows_lost_count",
        lambda day: max(0, day.rows_to_keep - day.rows),
        "A day has no fewer rows than what is published of it.",
        "bring back the raw files that it was built from; or, if fewer rows are right, build it with a new attempt and"
        " --accept-loss DAY",
        zero(contract=True),
        plant="SELECT * FROM t OFFSET 1",
    ),
    Metric(
        "gap_count",
        lambda day: day.rows == 0 and day.usual_rows >= day.settings.events.min_judged_rows,
        "No lookback day is empty after days with events.",
        _ARRIVED,
        warn(0, 0),
        plant="SELECT * FROM t WHERE false",
    ),
    Metric(
        "rows",
        lambda day: day.rows,
        "Recorded: lookback days that the raw logs do not cover.",
        _ARRIVED,
        (Limit(INFO, low=1),),
        panel=panels.ROWS,
        plant="SELECT * FROM t WHERE false",
    ),
    Metric("rows_read", lambda day: day.rows_read),
    Metric(
        "quarantine_share",
        lambda day: share(day.quarantined, day.rows_read),
        "Most raw rows are usable.",
        _RAW,
        (
            Limit(
                WARNING, high=Bound("events.max_quarantine_share_warning", 0.01), so_that="Few raw rows are refused."
            ),
            Limit(CRITICAL, high=Bound("events.max_quarantine_share_critical", 0.2), known=True),
        ),
        panel=panels.REFUSED,
    ),
    # A warning, because the published rows are clean.
    Metric(
        "duplicate_share",
        lambda day: share(day.duplicates, day.rows_read) if day.enough(day.rows_read) else 0.0,
        "Few raw rows are duplicates.",
        _RAW,
        warn(high=Bound("events.max_duplicate_share", 0.02)),
        panel=panels.REFUSED,
    ),
    # Exact duplicates never get into the table: these differ in feedback or watch time. The simulator plants 3 %.
    Metric(
        "repeated_key_share",
        lambda day: day.repeated_key_share,
        "(user, item, time) is nearly unique.",
        _RAW,
        warn(high=Bound("events.max_repeated_key_share", 0.06)),
        panel=panels.REPEATED,
        plant="SELECT * FROM t UNION ALL SELECT * FROM t",
    ),
    # An hour that was delivered twice has a share of 0.5 there, whatever its share of the day.
    Metric(
        "worst_hour_repeated_key_share",
        lambda day: day.worst_hour_repeated_key_share,
        "No hour was delivered twice.",
        _RAW,
        (
            Limit(
                WARNING,
                high=Bound("events.max_hour_repeated_key_share_warning", 0.15),
                so_that="(user, item, time) is nearly unique in each hour.",
            ),
            Limit(CRITICAL, high=Bound("events.max_hour_repeated_key_share_critical", 0.3), known=True),
        ),
        panel=panels.REPEATED,
        plant="SELECT * FROM t UNION ALL SELECT * FROM t WHERE event_time_ms // 3600000 % 24 = 5",
    ),
    # Distinct UTC hours with an event; times of day resolution have none.
    Metric(
        "hours_covered",
        lambda day: day.hours_covered,
        "Most hours of the day have events.",
        _RAW,
        warn(low=Bound("events.min_hours_covered", 12)),
        plant="SELECT * FROM t WHERE event_time_ms // 3600000 % 24 < 11",
    ),
    Metric(
        "odd_empty_hour_count",
        lambda day: day.odd_empty_hours,
        "No hour is empty between two full ones.",
        _ARRIVED,
        warn(high=0),
        plant="SELECT * FROM t WHERE event_time_ms // 3600000 % 24 <> 9",
    ),
    Metric(
        "rows_to_trailing_median",
        lambda day: day.rows / day.median_rows if day.rows and day.dense else NAN,
        "The day is about as large as the days before it.",
        _RAW,
        warn(Bound("events.min_rows_ratio", 0.3), Bound("events.max_rows_ratio", 3.0)),
        plant="SELECT * FROM t LIMIT (SELECT count(*) // 10 FROM t)",
    ),
    Metric("hour_share_*", lambda day: day.hour_shares),
)

_LABEL = (
    # Feeds with 1 % clicks are ordinary; exactly 0 or 1 is a fault.
    Metric(
        "label_rate",
        lambda day: day.label_rate,
        "The label rate is plausible.",
        _RAW,
        (
            Limit(CRITICAL, 0, 1, strict=True, so_that="The label is neither always 0 nor always 1."),
            Limit(WARNING, Bound("events.min_label_rate", 0.002), Bound("events.max_label_rate", 0.998)),
        ),
        panel=panels.LABEL_RATE,
        plant="SELECT * REPLACE (0 AS feedback) FROM t",
    ),
    Metric("action_rate_*", lambda day: day.action_rates, panel=panels.ACTION_RATES),
    Metric("watch_time_ms_p50", lambda day: day.percentile("watch_time_ms", 50), panel=panels.WATCH_TIME, line="p50"),
    Metric("watch_time_ms_p90", lambda day: day.percentile("watch_time_ms", 90), panel=panels.WATCH_TIME, line="p90"),
    Metric("duration_ms_p50", lambda day: day.percentile("duration_ms", 50)),
    Metric("duration_ms_p90", lambda day: day.percentile("duration_ms", 90)),
    Metric(
        "*", lambda day: day.vocabulary_shares
    ),  # <field>_share_<value>, of `context` and of the data set's own fields
)

_PEOPLE = (
    Metric(
        "users",
        lambda day: day.users if day.rows and (day.dense or day.judged) else NAN,
        "More than one user was active.",
        _RAW,
        warn(low=Bound("events.min_users", 2)),
        panel=panels.USERS,
        plant="SELECT * REPLACE (7 AS user_id) FROM t",
    ),
    Metric(
        "largest_user_share",
        lambda day: day.largest_user_share if day.judged else NAN,
        "No user dominates the day.",
        _RAW,
        warn(high=Bound("events.max_user_share", 0.4)),
        details=lambda day: f"it is user {day.largest_user}" if day.judged else "",
        panel=panels.REPEATED,
        plant="SELECT * REPLACE (CASE WHEN item_id % 2 = 0 THEN 0 ELSE user_id END AS user_id) FROM t",
    ),
    # Among so many users no ordinary one can have so many rows.
    Metric(
        "bot_user_share",
        lambda day: (
            day.largest_user_share if day.judged and day.users >= day.settings.events.min_users_for_bots else NAN
        ),
        "Among many users, none dominates the day.",
        "find out who it is; remove a bot's rows from the raw logs, then rebuild with a new attempt",
        (Limit(CRITICAL, high=Bound("events.max_user_share_critical", 0.3)),),
        details=lambda day: f"it is user {day.largest_user}" if day.judged else "",
        plant="SELECT * REPLACE (CASE WHEN item_id % 2 = 0 THEN 0 ELSE user_id END AS user_id) FROM t",
    ),
    Metric("known_user_share", lambda day: day.known_user_share, panel=panels.KNOWN, line="user"),
    Metric("known_item_share", lambda day: day.known_item_share, panel=panels.KNOWN, line="item"),
    Metric("item_popularity_correlation", lambda day: day.item_popularity_correlation),
    Metric("duration_mismatch_share", lambda day: day.duration_mismatch_share),
    # Rows that the day before has at the same time of day: the same user and item.
    Metric(
        "repeated_day_share",
        lambda day: day.repeated_day_share,
        "The day is not the day before, delivered again.",
        _ARRIVED,
        most(Bound("drift.repeated_day_share_warning", 0.02), Bound("drift.repeated_day_share_critical", 0.2)),
    ),
)

COMPARED = (
    Metric(
        "missing_hour_count",
        lambda day: len(day.missing_hours) if day.compares_hours else NAN,
        "No hour is without events that has them on other days.",
        _ARRIVED,
        (Limit(CRITICAL, high=0),),
        details=lambda day: f"no event in the UTC hour(s) {day.said(day.missing_hours)}",
    ),
    Metric(
        "thin_hour_count",
        lambda day: len(day.thin_hours) if day.compares_hours else NAN,
        "No hour has far fewer events than on other days.",
        _ARRIVED,
        warn(high=0),
        details=lambda day: f"few events in the UTC hour(s) {day.said(day.thin_hours)}",
    ),
    Metric(
        "hour_shift",
        lambda day: day.hour_shift,
        "The hour profile is not another day's, turned round.",
        _ZONE,
        (Limit(CRITICAL, 0, 0),),
        details=lambda day: (
            f"the day looks moved by about {day.hour_shift:+.0f} h: check the time zone of the raw times"
        ),
    ),
    # Weekends move KuaiRand's profile by a few hundredths.
    Metric(
        "hour_psi",
        lambda day: day.hour_psi,
        "The hour profile is that of the days before (PSI).",
        _ZONE,
        most(Bound("drift.hour_psi_warning", 0.15), Bound("drift.hour_psi_critical", 0.5)),
        panel=panels.DRIFT,
    ),
    Metric(
        "label_rate_to_trailing",
        lambda day: day.label_rate / day.usual_label_rate if day.compares_label else NAN,
        "The label rate is that of the days before.",
        _LOGGING,
        LABEL_RATE_RATIO,
        details=lambda day: (
            f"the rate is {day.label_rate:.4f}, the median of the days before {day.usual_label_rate:.4f}"
        ),
    ),
    Metric(
        "label_kl",
        lambda day: day.label_kl if day.compares_label else NAN,
        "The label's distribution is that of the days before (KL).",
        _LOGGING,
        warn(high=Bound("drift.label_kl_warning", 0.03)),
        panel=panels.DRIFT,
    ),
    Metric(
        "vanished_signal_count",
        lambda day: len(day.vanished_signals) if day.compares_signals else NAN,
        "Every signal of the days before still occurs.",
        _LOGGING,
        (Limit(CRITICAL, high=0),),
        details=lambda day: f"never set: {', '.join(day.vanished_signals)}",
    ),
    Metric(
        "action_mix_psi",
        lambda day: day.action_mix_psi if day.compares_signals else NAN,
        "The mix of signals is that of the days before (PSI).",
        _LOGGING,
        most(Bound("drift.action_mix_psi_warning", 0.1), Bound("drift.action_mix_psi_critical", 0.5)),
        panel=panels.DRIFT,
    ),
    Metric(
        "new_category_share",
        lambda day: day.new_category_share,
        "Fields have the values of the days before.",
        _LOGGING,
        warn(high=NEW_CATEGORY_SHARE),
        details=lambda day: day.new_categories,
    ),
    Metric(
        "field_psi",
        lambda day: day.field_psi,
        "Values of fields are as frequent as on the days before (PSI).",
        _LOGGING,
        warn(high=FIELD_PSI),
        details=lambda day: day.differing_field,
        panel=panels.DRIFT,
    ),
    Metric(
        "known_user_share_drop",
        lambda day: day.drop("known_user_share"),
        "As many rows as before are of known users.",
        _IDS,
        most(Bound("drift.known_user_drop_warning", 0.3), Bound("drift.known_user_drop_critical", 0.6)),
    ),
    Metric(
        "known_item_share_drop",
        lambda day: day.drop("known_item_share"),
        "As many rows as before are of known items (novelty).",
        _IDS,
        most(Bound("drift.known_item_drop_warning", 0.3), Bound("drift.known_item_drop_critical", 0.6)),
    ),
    Metric(
        "item_popularity_drop",
        lambda day: day.drop("item_popularity_correlation"),
        "Items that were popular still are.",
        _IDS,
        most(Bound("drift.item_popularity_drop_warning", 0.3), Bound("drift.item_popularity_drop_critical", 0.5)),
    ),
    # Rows whose item had another duration before: an id that means another item.
    Metric(
        "duration_mismatch_rise",
        lambda day: day.rise("duration_mismatch_share"),
        "An item has the duration that it had.",
        _IDS,
        most(Bound("drift.duration_mismatch_rise_warning", 0.05), Bound("drift.duration_mismatch_rise_critical", 0.3)),
    ),
    Metric(
        "largest_user_share_rise",
        lambda day: day.rise("largest_user_share"),
        "No user takes far more of the day than before.",
        _RAW,
        warn(high=Bound("drift.largest_user_share_rise", 0.1)),
    ),
    Metric(
        "watch_p50_to_trailing",
        lambda day: day.ratio("watch_time_ms_p50"),
        "The median watch time is that of the days before.",
        _LOGGING,
        warn(_WATCH_RATIO, _WATCH_RATIO),
    ),
    # Below 1 over the smallest trailing day, above 1 over the largest; judged where those days are steady.
    Metric(
        "rows_to_trailing_extremes",
        lambda day: day.rows_to_extremes,
        "The day is not smaller than the smallest of steady days, nor larger than the largest.",
        _ARRIVED,
        graded(
            Limit(WARNING, high=Bound("drift.rows_to_extremes_warning", 1.67)),
            Limit(CRITICAL, low=Bound("drift.rows_to_extremes_critical", 0.6)),
        ),
    ),
)

SUITES = (Suite("events_days", "events", "staged day", (*_CONTRACT, *_ROWS, *_LABEL, *_PEOPLE), COMPARED),)
