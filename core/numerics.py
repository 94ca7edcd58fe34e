"""Numbers of docs/numerics.md sections 4, 5 and 7 that every backend computes with: one definition."""

# Newton-Schulz: the coefficients of Keller Jordan's Muon, 2024, and what is added to a matrix's norm.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_EPS = 1e-7
# Added to the global norm in the clip.
CLIP_EPS = 1e-6
# Float16's loss scale: at the start, at most, and the good steps after which it doubles.
SCALE_START, SCALE_MOST = 65_536.0, float(1 << 24)
SCALE_GROWTH_INTERVAL = 2_000
# The state of a loss scaler, in the order of a checkpoint's `backend_state`.
SCALER_FIELDS = (
    "loss_scale",
    "good_steps",
    "overflows_total",
    "skipped_total",
    "skipped_in_a_row",
)
