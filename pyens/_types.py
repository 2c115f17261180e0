"""The named tuples that operations and their references return, and the names that arguments may be."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

from torch import Tensor

# A rate, one for each member [E], or one for each hidden layer [1, H] or [E, H].
Dropout = float | Sequence[float] | Sequence[Sequence[float]] | Tensor
ActivationName = Literal[
    "relu",
    "gelu",
    "silu",
    "elu",
    "softplus",
    "tanh",
    "identity",
    "mish",
    "celu",
    "leaky_relu",
    "sigmoid",
    "gelu_tanh",
    "hardswish",
    "sin",
]
Activation = ActivationName | str  # or with its parameter, "elu(0.5)"
Norm = Literal["layer_norm", "rms_norm"]
NormPosition = Literal["before_activation", "after_activation"]
DropoutPosition = Literal["after_activation", "before_norm"]
Residual = bool | Sequence[bool]
Loss = Literal[
    "mse",
    "bce",
    "gaussian_nll",
    "cross_entropy",
    "huber",
    "smooth_l1",
    "quantile",
    "poisson_nll",
    "soft_cross_entropy",
]
LossReduction = Literal["mean", "none"]
Bootstrap = Literal["poisson", "multinomial"]
Decorrelation = Literal["correlation", "covariance", "residue"]
Reduction = Literal["sum", "none"]
Distance = Literal["squared", "absolute"]
Space = Literal["probability", "logit"]
AssignmentMode = Literal["grouped", "round_robin", "random"]  # which row meets which mask
MaskMode = Literal[AssignmentMode, "tiled"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
WeightLayout = Literal["out_in", "in_out"]
Binning = Literal["width", "mass"]
PredictionVariation = Literal["value", "distribution"]
UncertaintyScore = Literal["entropy", "margin", "mutual_information", "variation_ratio"]
VariationTask = Literal["regression", "classification"]
StrengthFeatures = Literal["binary", "value", "both"]


class LayerOptions(TypedDict, total=False):
    """What the layers of an `EnsembleMLP` are beside linear: its arguments of these names."""

    activation: Activation | Sequence[Activation]
    output_activation: Activation
    norm: Norm | Sequence[Norm | None] | None
    norm_affine: bool
    norm_eps: float | None
    norm_position: NormPosition
    residual: Residual
    dropout: float | Sequence[float] | Sequence[Sequence[float]]
    dropout_position: DropoutPosition


class LayerOptionsAndBias(LayerOptions, total=False):
    """The same where no tensors say which layers have biases."""

    bias: bool | Sequence[bool]


class LossOptions(TypedDict, total=False):
    """Options of one loss or another, see `pyens.ops.ensemble_mlp_loss`."""

    temperature: float
    label_smoothing: float
    delta: float
    quantiles: Sequence[float] | Tensor | None
    class_weight: Tensor | None
    log_variance_min: Tensor | float | None
    log_variance_max: Tensor | float | None


class ActivationStrength(NamedTuple):
    """An MLP's output, and what its hidden units did on the way."""

    output: Tensor  # [E, B, O]
    value: Tensor  # [E, B, ΣH]: (h - mean) / std of each hidden unit, layer after layer
    active: Tensor  # [E, B, ΣH] bool, or uint8 [E, B, ⌈ΣH/8⌉] with eight units to a byte: h > 0


class Uncertainty(NamedTuple):
    """What an ensemble is unsure of, per example; entropies in nats."""

    mean_probability: Tensor  # [B, K], or [B]: p̄ = mean_m p_m
    predictive_entropy: Tensor  # [B], H(p̄)
    expected_entropy: Tensor  # [B], mean_m H(p_m)
    mutual_information: Tensor  # [B], H(p̄) - mean_m H(p_m), >= 0
    distribution_pv: Tensor  # [B], Σ_m KL(p_m ‖ p̄) = E · mutual information
    vote_disagreement: Tensor  # [B], 1 - largest share of the members' votes


class Moments(NamedTuple):
    """Mean and spread over the members, element by element."""

    mean: Tensor  # [B] or [B, K], like all of them
    std: Tensor  # with E - 1
    min: Tensor
    max: Tensor
    aleatoric: Tensor | None  # mean_m of the members' own variances
    epistemic: Tensor | None  # variance of the members' means, with E
