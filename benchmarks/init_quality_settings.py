"""The settings that `init_quality.py` measures, as recipe fields."""

from __future__ import annotations

from typing import Any

# The closed form on a searched grid and nothing beyond it: what each addition is added to, whatever the defaults are.
PLAIN: dict[str, Any] = {
    "method": "optq",
    "grid": "searched",
    "damping": 0.01,
    "sweeps": 0,
    "refit": False,
    "rank": 64,
    "error_aware": 0.0,
    "token_weighting": "none",
}
# Name -> (preset, recipe fields beside it). "default..." changes the default in one respect, "plain..." adds to PLAIN.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", {}),
    "paper": ("paper", {}),
    "paper+searched": ("paper", {"grid": "searched"}),
    "plain": ("default", PLAIN),
    "plain+rtn": ("default", PLAIN | {"method": "rtn"}),
    "plain+minmax": ("default", PLAIN | {"grid": "minmax"}),
    "plain+magr": ("default", PLAIN | {"method": "magr"}),
    "plain+magr-1e-4": ("default", PLAIN | {"method": "magr", "magr_alpha": 1e-4}),
    "plain+refit": ("default", PLAIN | {"refit": True}),
    "plain+sweeps": ("default", PLAIN | {"sweeps": 4}),
    "plain+refit+sweeps": ("default", PLAIN | {"refit": True, "sweeps": 4}),
    "plain+inverse-norm": ("default", PLAIN | {"token_weighting": "inverse_norm"}),
    "plain+error-aware-0.25": ("default", PLAIN | {"error_aware": 0.25}),
    "plain+error-aware-0.5": ("default", PLAIN | {"error_aware": 0.5}),
    "plain+error-aware-0.75": ("default", PLAIN | {"error_aware": 0.75}),
    "plain+error-aware-1.0": ("default", PLAIN | {"error_aware": 1.0}),
    "default+error-aware-0": ("default", {"error_aware": 0.0}),
    "default+error-aware-0.25": ("default", {"error_aware": 0.25}),
    "default+error-aware-0.5": ("default", {"error_aware": 0.5}),
    "default+error-aware-0.75": ("default", {"error_aware": 0.75}),
    "default+error-aware-1.0": ("default", {"error_aware": 1.0}),
    "default+float-share-1": ("default", {"float_share": 1.0}),
    "default+no-weighting": ("default", {"token_weighting": "none"}),
    "default+inverse-norm": ("default", {"token_weighting": "inverse_norm"}),
    "default+no-refit": ("default", {"refit": False}),
    "default+refit": ("default", {"refit": True}),
    "default+no-sweeps": ("default", {"sweeps": 0}),
    "default+sweeps": ("default", {"sweeps": 4}),
    "default+magr": ("default", {"method": "magr"}),
    "default+minmax": ("default", {"grid": "minmax"}),
    "default+damping-0.001": ("default", {"damping": 0.001}),
    "default+damping-0.05": ("default", {"damping": 0.05}),
    "default+rank-0": ("default", {"rank": 0}),
    "default+rank-4": ("default", {"rank": 4}),
    "default+rank-16": ("default", {"rank": 16}),
    "plain+rank-16": ("default", PLAIN | {"rank": 16}),
    **{
        f"{base}+low-rank-{rounds}{'-rank-16' if rank == 16 else ''}": (
            "default",
            (PLAIN if base == "plain" else {}) | {"low_rank_rounds": rounds, "rank": rank},
        )
        for base in ("plain", "default")
        for rounds in (1, 3, 6)
        for rank in (64, 16)
    },
    "plain+low-rank-3-half": ("default", PLAIN | {"low_rank_rounds": 3, "low_rank_share": 0.5}),
    "plain+low-rank-3-magr-1e-4": ("default", PLAIN | {"low_rank_rounds": 3, "method": "magr", "magr_alpha": 1e-4}),
    "plain+low-rank-3-sweeps": ("default", PLAIN | {"low_rank_rounds": 3, "sweeps": 4}),
    "paper+low-rank-3": ("paper", {"low_rank_rounds": 3}),
    "default+low-rank-3-refine": ("default", {"low_rank_rounds": 3, "refine": "block"}),
    "default+symmetric": ("default", {"symmetric": True}),
    "default+group-32": ("default", {"group_size": 32}),
    "default+group-128": ("default", {"group_size": 128}),
    "default+adapter-float32": ("default", {"adapter_dtype": "float32"}),
    "default+float32-forward": ("default", {"precision": "float32"}),
    "default+refine": ("default", {"refine": "block"}),
    "default+refine-rank-0": ("default", {"refine": "block", "rank": 0}),
    "default+refine-rank-16": ("default", {"refine": "block", "rank": 16}),
    "default+refine-model": ("default", {"refine": "model"}),
    "default+refine-model-rank-0": ("default", {"refine": "model", "rank": 0}),
    "default+refine-model-rank-16": ("default", {"refine": "model", "rank": 16}),
    "apiq-lw": ("default", {"refine": "apiq-lw"}),
    "apiq-bw": ("default", {"refine": "apiq-bw"}),
    # The same number of adapter parameters as rank 64 everywhere, for blocks shaped as the demo model's.
    "default+rank-to-mlp": ("default", {"overrides": {"*.mlp.*": {"rank": 80}, "*.self_attn.*": {"rank": 37}}}),
    "default+rank-to-attention": ("default", {"overrides": {"*.mlp.*": {"rank": 44}, "*.self_attn.*": {"rank": 96}}}),
}
