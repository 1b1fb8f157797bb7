import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from embedcache.errors import SettingError, UnknownNameError
from embedcache.projectors.base import PROJECTORS, split_names
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import PairConfig, Side, cost
from tests.projectors.contract import ProjectorContract, TokenProjectorContract


class TestLinear(ProjectorContract):
    name = "linear"


class TestMlp(ProjectorContract):
    name = "mlp"


class TestGlu(ProjectorContract):
    name = "glu"


class TestFuseMix(ProjectorContract):
    name = "fusemix"


class TestShareLock(ProjectorContract):
    name = "sharelock"


class TestIdentity(ProjectorContract):
    name = "identity"
    widths = (24, 24)


class TestAsif(ProjectorContract):
    name = "asif"


class TestOpenClipLinear(ProjectorContract):
    name = "openclip-linear"


class TestOpenClipImageMlp(ProjectorContract):
    name = "openclip-mlp-image"


class TestOpenClipTextMlp(ProjectorContract):
    name = "openclip-mlp-text"


class TestToken(TokenProjectorContract):
    name = "token"


class TestClsToken(TokenProjectorContract):
    name = "cls_token"


class TestTokenMlp(TokenProjectorContract):
    name = "token_mlp"


class TestOnesOwn(ProjectorContract):
    name = "embedcache.projectors.heads:LinearProjector"


def test_every_projector_of_the_table_is_tested() -> None:
    tested = [*ProjectorContract.__subclasses__(), *TokenProjectorContract.__subclasses__()]
    assert {kind.name for kind in tested} >= set(PROJECTORS.paths)


@pytest.mark.parametrize(
    ("name", "widths", "millions"),
    [
        ("glu", [(2048, 1024), (4096, 1024)], 386.0),
        ("fusemix", [(1536, 512), (1024, 512)], 110.4),
        ("sharelock", [(4096, 1024)], 54.6),
    ],
)
def test_sizes_are_those_of_the_papers(name: str, widths: list[tuple[int, int]], millions: float) -> None:
    with torch.device("meta"):
        projectors = [PROJECTORS.load(name)(*some) for some in widths]
    count = sum(parameter.numel() for projector in projectors for parameter in projector.parameters())
    assert round(count / 1e6, 1) == millions


def test_identity_keeps_the_width() -> None:
    with pytest.raises(SettingError, match="keeps the feature's width of 24, and the shared space has 10; use --sh"):
        PROJECTORS.load("identity")(24, 10)


def test_both_sides_or_one_each_are_named() -> None:
    assert split_names("glu") == ("glu", "glu")
    assert split_names("identity+sharelock") == ("identity", "sharelock")


def test_an_unknown_projector_names_the_near_miss() -> None:
    with pytest.raises(UnknownNameError, match="unknown projector 'mpl'; did you mean 'mlp'"):
        PROJECTORS.load("mpl")


@pytest.mark.parametrize(
    ("projector", "text_width", "shared_width", "count"),
    [
        ("cls_token+token_mlp", 1024, 1024, 11_553_793),  # DINOv2-L and all-roberta-large-v1
        ("cls_token+token_mlp", 768, 768, 7_290_113),  # and mpnet
        ("cls_token+token", 768, 768, 6_107_393),  # and CLIP's texts, without the head
    ],
)
def test_the_papers_pairs_have_the_papers_parameters(
    projector: str, text_width: int, shared_width: int, count: int
) -> None:
    with torch.device("meta"):
        pair = AlignedPair(projector, image_width=1024, text_width=text_width, shared_width=shared_width)
    assert sum(parameter.numel() for parameter in pair.parameters() if parameter.requires_grad) == count


def plain_token(projector: torch.nn.Module, token: Tensor) -> Tensor:
    """The paper's T of one token."""
    normed = layer_norm(token, token.shape, projector.norm[0].weight, projector.norm[0].bias)
    hidden = gelu(projector.hidden.weight @ normed + projector.hidden.bias)
    linear = projector.linear.weight @ normed + projector.linear.bias
    return linear + projector.output.weight @ hidden + projector.output.bias


def test_token_projectors_are_the_papers_formulas() -> None:
    torch.manual_seed(1)
    tokens, lengths = torch.randn(4, 5, 6), torch.tensor([5, 3, 1, 2])
    token, cls_token, token_mlp = (PROJECTORS.load(name)(6, 3).eval() for name in ("token", "cls_token", "token_mlp"))
    for number, length in enumerate(lengths.tolist()):
        item = tokens[number, :length]
        mean = torch.stack([plain_token(token, row) for row in item]).mean(dim=0)
        torch.testing.assert_close(token(tokens, lengths)[number], mean)
        expected = plain_token(cls_token.cls, item[0])
        if length > 1:
            expected = expected + torch.stack([plain_token(cls_token.patches, row) for row in item[1:]]).mean(dim=0)
        torch.testing.assert_close(cls_token(tokens, lengths)[number], expected)
        linear = token_mlp.linear(torch.stack([plain_token(token_mlp.tokens, row) for row in item]).mean(dim=0))
        head = layer_norm(
            token_mlp.residual[1](gelu(linear)) + linear, (3,), token_mlp.norm.weight, token_mlp.norm.bias
        )
        torch.testing.assert_close(token_mlp(tokens, lengths)[number], head)


def test_dropout_is_that_of_the_pair() -> None:
    for name, dropout in (("cls_token", 0.3), ("token_mlp", 0.0)):
        pair = AlignedPair(name, image_width=4, text_width=4, shared_width=4, dropout=dropout)
        assert {module.p for module in pair.modules() if isinstance(module, torch.nn.Dropout)} == {dropout}


def config(projector: str) -> PairConfig:
    image, text = (Side(feature="f", spec="s", fingerprint={}, width=width) for width in (6, 5))
    return PairConfig(projector=projector, shared_width=4, image=image, text=text, index_digest="", training={})


def test_cost_is_counted_by_hand() -> None:
    linear = cost(config("linear"), (6,), (5,))
    assert (linear.parameters, linear.flops_a_pair) == (6 * 4 + 5 * 4 + 1, 2 * (6 * 4 + 5 * 4))
    token = cost(config("token+linear"), (49, 6), (5,))
    assert token.flops_a_pair == 2 * (49 * 6 * 4 + 6 * 4 + 4 * 4 + 5 * 4)
    assert token.parameters == 12 + 2 * (6 * 4 + 4) + 4 * 4 + 4 + 5 * 4 + 1
    asif = cost(config("asif"), (6,), (5,))
    assert (asif.parameters, asif.flops_a_pair) == (1, 2 * (6 * 4 + 5 * 4))
