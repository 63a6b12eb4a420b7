"""The model card beside a set of weights."""

from typing import Any

from ..nn.disks import CURVE_COUNTS
from ..nn.model import Network


def model_card(
    name: str,
    model: Network,
    facts: dict[str, Any],
    figures: dict[float, dict[str, float]],
    remarks: str = "",
) -> str:
    """Markdown beside the weights: training, figures on held-out prototypes, limits."""
    rows = {
        "recall at 1 px": "recall",
        "precision at 1 px": "precision",
        "position rms, px": "position_rms_px",
        "position median, px": "position_median_px",
        "strain rms, 1e-3": "strain_rms_1e-3",
        "truth within 1 sigma": "coverage_1",
        "truth within 2 sigma": "coverage_2",
        "e_xx, e_yy within 1 error bar": "strain_coverage_1",
        "e_xx, e_yy within 2 error bars": "strain_coverage_2",
        "R factor of |V_g|": "R",
        "the same, best scale per pattern": "R_scaled",
        "control: sqrt(disk intensity)": "R_sqrt_I",
        "control: smooth fall-off": "R_blind",
        "R factor, allowed sites": "R_allowed",
        "control: smooth fall-off, allowed": "R_blind_allowed",
        "forbidden / allowed |V_g|": "forbidden_ratio",
        "control: forbidden / allowed sqrt(I)": "forbidden_ratio_sqrt_I",
    }
    config, n_parameters = model.config, sum(p.numel() for p in model.parameters())
    table = [f"| | {' | '.join(f'{dose:.0e}' for dose in figures)} |", "|---" * (len(figures) + 1) + "|"]
    for label, key in rows.items():
        table.append(f"| {label} | {' | '.join(f'{f[key]:.3g}' for f in figures.values())} |")
    lines = [
        f"# Weights `{name}`",
        "",
        f"Network `{config.kind}`, {n_parameters:,} parameters; threshold {config.threshold:g};",
        *(
            f"sigma of disks of 2^-8.5, 2^-7.5 ... 2^-3.5 radii in patterns with {count} disks times "
            + ", ".join(f"{factor:.3g}" for factor in row)
            + ";"
            for count, row in zip(CURVE_COUNTS, config.sigma_curve, strict=False)
        ),
        f"peak sigma = sqrt(({config.sigma_scale:.3g} sigma)^2 + ({config.sigma_floor_px:.3g} px)^2);",
        f"dilation shared by the positions of a pattern: sqrt(({config.dilation_scale:.3g} std)^2",
        f"+ ({config.dilation_floor:.2g})^2).",
        "",
        "## Training",
        "",
        *(f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items()),
        "",
        "Patterns were simulated on the fly (`fcunet.simulation`: dynamical N-beam scattering, Poisson",
        "noise, camera faults). Crystals are split by prototype structure: no figure below is on a",
        "prototype trained on.",
        "",
        "## Figures on held-out prototypes, by dose in electrons per pattern",
        "",
        *table,
        "",
        "Strain rms: what the position errors of one pattern would be taken for, all four components, best",
        "95 % of the patterns. R factor: sum of | |V_g| predicted - true | over the sum of true, lit",
        "forbidden sites included; both controls are granted the best scale for each pattern.",
        "",
    ]
    return "\n".join(lines) + (f"\n{remarks}\n" if remarks else "")
