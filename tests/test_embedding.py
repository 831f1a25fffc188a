"""Low-bit embeddings: lookups against NumPy, row by row; whole tables, trained, restored and deployed."""

import numpy as np
import paddle
import pytest
from test_program import calibrated, ernie_inputs, run
from test_ternary import binary, ternary
from test_trainer import EMBEDDING, same, settings, weights_of

from ernie_kqat import KurtosisQAT, UserError, config
from ernie_kqat.config import Quant, TableQuant
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.quantizers import numeric
from ernie_kqat.quantizers.embedding import KEY, QuantizedEmbedding
from ernie_kqat.restore import restore_run
from ernie_kqat.trainer import train

ROWS, FEATURES, PADDING = 50, 24, 3
RNG = np.random.default_rng(0)
TABLE = (RNG.standard_normal((ROWS, FEATURES)) * np.logspace(-2, 2, ROWS)[:, None]).astype(np.float32)
IDS = np.array([[7, 49, PADDING, 7, 0], [12, 7, 30, PADDING, PADDING]])  # a row twice, and padding
KINDS = {
    "absmax": {"bits": 8},
    "mse": {"bits": 4, "range": "mse"},
    "percentile": {"bits": 4, "range": "percentile", "percentile": 90.0},
    "learned": {"bits": 3, "range": "learned"},
    "lsq": {"quantizer": "lsq", "bits": 4, "init": "mean"},
    "ternary": {"quantizer": "ternary", "bits": 2},
    "binary": {"quantizer": "binary", "bits": 1},
    "split": {"quantizer": "binary", "bits": 1, "split": True},
}
WORDS = "ernie.embeddings.word_embeddings"


def on_grid(row, step, bits):
    """Equation by equation, one row, in float64."""
    largest = 2 ** (bits - 1) - 1
    return step * np.clip(np.rint(row.astype(np.float64) / step), -largest, largest)


ORACLES = {
    "absmax": lambda row: on_grid(row, np.abs(row).max() / 127, 8),
    "mse": lambda row: on_grid(row, numeric.mse_range(row, 4, "tensor") / 7, 4),
    "percentile": lambda row: on_grid(row, np.percentile(np.abs(row), 90.0) / 7, 4),
    "learned": lambda row: on_grid(row, numeric.mse_range(row, 3, "tensor") / 3, 3),
    "lsq": lambda row: on_grid(row, 2 * np.abs(row).mean() / np.sqrt(7), 4),
    "ternary": ternary,
    "binary": binary,
    "split": ternary,  # where it begins
}


def quantized_embedding(kind, granularity="row", table=TABLE):
    plain = paddle.nn.Embedding(ROWS, FEATURES, padding_idx=PADDING)
    plain.weight.set_value(table)
    return QuantizedEmbedding(plain, TableQuant(granularity=granularity, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_lookups_are_the_papers_row_by_row(kind, granularity):
    found = quantized_embedding(kind, granularity)(paddle.to_tensor(IDS)).numpy()
    if granularity == "row":
        expected = np.stack([ORACLES[kind](row) for row in TABLE])
    else:
        expected = ORACLES[kind](TABLE.reshape(-1)).reshape(TABLE.shape)
    expected[PADDING] = 0
    np.testing.assert_allclose(found, expected[IDS], rtol=2e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_what_is_deployed_is_what_is_looked_up_bit_for_bit(kind, granularity):
    """Also after training moved weight and state; and one row alone is what it is among others."""
    made = quantized_embedding(kind, granularity)
    optimizer = paddle.optimizer.Adam(1e-3, parameters=made.parameters())
    for _ in range(3):
        (made(paddle.to_tensor(IDS)) ** 2).sum().backward()
        optimizer.step()
        optimizer.clear_grad()
    made.eval()
    deployed = made.deployed()
    everything = np.arange(ROWS).reshape(2, -1)
    for ids in (everything, IDS, np.array([[7]])):
        tensor = paddle.to_tensor(ids)
        np.testing.assert_array_equal(made(tensor).numpy(), deployed(tensor).numpy())
    levels = 4 if kind == "split" else 2**made._fake_quant_weight.bits
    assert all(len(np.unique(row)) <= levels for row in deployed.weight.numpy())


@pytest.mark.parametrize("kind", ["absmax", "mse", "percentile", "ternary", "binary", "split"])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_the_gradient_passes_straight_through_to_the_rows_looked_up(kind, granularity):
    made = quantized_embedding(kind, granularity)
    grad = RNG.standard_normal((*IDS.shape, FEATURES)).astype(np.float32)
    (made(paddle.to_tensor(IDS)) * paddle.to_tensor(grad)).sum().backward()
    expected = np.zeros_like(TABLE)
    np.add.at(expected, IDS, grad)
    expected[PADDING] = 0
    np.testing.assert_allclose(made.weight.grad.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lsq", "learned"])
def test_steps_of_the_rows_looked_up_get_lsqs_gradient(kind):
    made = quantized_embedding(kind)
    grad = RNG.standard_normal((*IDS.shape, FEATURES))
    (made(paddle.to_tensor(IDS)) * paddle.to_tensor(grad.astype(np.float32))).sum().backward()
    by_row = np.zeros((ROWS, FEATURES))
    np.add.at(by_row, IDS, grad)
    by_row[PADDING] = 0
    high = made._fake_quant_weight.high
    step = made._fake_quant_weight.step().numpy().astype(np.float64)[:, None]
    ratio = TABLE / step
    slope = np.where(np.abs(ratio) <= high, np.rint(ratio) - ratio, high * np.sign(ratio)) * by_row
    expected = slope.sum(axis=1) / np.sqrt(FEATURES * high)
    (state,) = made._fake_quant_weight.parameters()
    if kind == "learned":  # the parameter is the logarithm of the range
        expected = expected * step[:, 0]
    np.testing.assert_allclose(state.grad.numpy(), expected, rtol=2e-4, atol=1e-6)


def test_a_range_of_least_squares_follows_only_the_rows_looked_up():
    made = quantized_embedding("mse")
    before = made._fake_quant_weight.range.numpy()
    made.weight.set_value(TABLE * 1.05)
    made.eval()
    made(paddle.to_tensor(IDS))
    np.testing.assert_array_equal(made._fake_quant_weight.range.numpy(), before)
    made.train()
    made(paddle.to_tensor(IDS))
    moved = np.flatnonzero(made._fake_quant_weight.range.numpy() != before)
    assert set(moved) <= set(IDS.flatten())
    assert {7, 49, 12} <= set(moved)
    q = np.clip(np.rint(TABLE[7] * 1.05 / (before[7] / 7)), -7, 7)
    np.testing.assert_allclose(made._fake_quant_weight.range.numpy()[7], 7 * (TABLE[7] * 1.05 @ q) / (q @ q), rtol=1e-5)


def test_a_split_table_moves_by_the_rate_of_both_halves():
    assert quantized_embedding("split").weight.optimize_attr["learning_rate"] == 2.0
    assert quantized_embedding("binary").weight.optimize_attr["learning_rate"] == 1.0


def test_rules_say_which_tables(tiny_ernie):
    model = load_classifier(str(tiny_ernie), 2)
    qat = KurtosisQAT({"embedding": EMBEDDING["quant"]["embedding"]})
    qat.quantize(model)
    assert [str(entry) for entry in qat.tables] == [
        f"{WORDS}: 4 bits, minmax per row, range mse",
        "ernie.embeddings.position_embeddings: 4 bits, lsq per row",
        "ernie.embeddings.token_type_embeddings: 4 bits, minmax per tensor, range mse",
    ]
    assert sum(isinstance(layer, QuantizedEmbedding) for layer in model.sublayers()) == 3


def test_the_word_embeddings_alone_are_quantized_without_rules(tiny_ernie):
    model = load_classifier(str(tiny_ernie), 2)
    qat = KurtosisQAT({"embedding": {}})
    qat.quantize(model)
    assert [str(entry).partition(": ")[2] for entry in qat.tables] == [
        "8 bits, minmax per row, range absmax",
        "fp32",
        "fp32",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, f"{KEY}.bits: 1 for {WORDS}; quantizer minmax has 2 to 8"),
        ({"granularity": "channel"}, "'channel' is not one of row | tensor"),
        ({"tables": [["positions", {}]]}, f"{KEY}.tables[0]: rule 'positions' has no effect: no layer matches"),
        ({"tables": [["position", "fp32"]]}, f"{KEY}.tables: 'fp32' is not `skip`"),
        ({"tables": [["position", {"bit": 4}]]}, "position_embeddings).bit: unknown key; did you mean bits?"),
        ({"quantizer": "lsx"}, "quantizer: 'lsx' is not one of"),
    ],
)
def test_wrong_options_are_named(tiny_ernie, options, message):
    with pytest.raises(UserError) as error:
        KurtosisQAT({"embedding": options}).quantize(load_classifier(str(tiny_ernie), 2))
    assert message in str(error.value)


def test_a_model_without_such_a_table_is_refused():
    with pytest.raises(UserError, match="no Embedding named word_embeddings"):
        KurtosisQAT({"embedding": {}}).quantize(paddle.nn.Sequential(paddle.nn.Linear(4, 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_ernie_is_deployed_as_it_is_simulated(tmp_path, tiny_ernie, kind):
    """Its linear layers stay in fp32, so that nothing but the embeddings can differ."""
    model = load_classifier(str(tiny_ernie), 2)
    tables = [["position|token_type", {"quantizer": "minmax", "bits": 8, "split": False}]]
    qat = KurtosisQAT({"embedding": {**KINDS[kind], "tables": tables}, "layers": [["classifier", {}], ["", "skip"]]})
    fp32 = model(*map(paddle.to_tensor, ernie_inputs())).numpy()
    qat.quantize(model)
    model.eval()
    calibrated(model, *map(paddle.to_tensor, ernie_inputs()))
    simulated = model(*map(paddle.to_tensor, ernie_inputs())).numpy()
    qat.save_quantized_model(model, str(tmp_path / "m"))
    deployed = run(tmp_path / "m", *ernie_inputs())
    np.testing.assert_allclose(deployed, simulated, atol=0.02 * simulated.std())
    assert np.abs(simulated - fp32).max() > 1e-4


def test_what_a_run_trained_is_restored_with_its_state(tmp_path, tiny_ernie, tiny_task):
    brief = {"max_steps": 6, "select": "last"}
    train(settings(tmp_path, tiny_ernie, tiny_task, Slim=EMBEDDING, Train=brief))
    restored = restore_run(tmp_path / "run")
    trained, state = weights_of(tmp_path / "run"), restored.model.state_dict()
    names = [name for name in state if "embeddings" in name]
    assert {name.rpartition(".")[2] for name in names} >= {"range", "lsq_step", "weight"}
    for name in names:
        np.testing.assert_array_equal(state[name].numpy(), trained[f"model/{name}"])
    fresh = numeric.mse_range(trained[f"model/{WORDS}.weight"].T, 4, "channel")
    assert not np.array_equal(fresh, state[f"{WORDS}._fake_quant_weight.range"].numpy())  # it is state, not recomputed
    assert f"{WORDS}: 4 bits, minmax per row, range mse" in restored.plan


def test_without_the_section_nothing_changes(tmp_path, tiny_ernie, tiny_task):
    for name, quant in (("absent", {}), ("null", {"embedding": None})):
        train(settings(tmp_path, tiny_ernie, tiny_task, name, Slim={"quant": quant}, Train={"max_steps": 3}))
    same(weights_of(tmp_path / "absent"), weights_of(tmp_path / "null"))
    assert "word_embeddings" not in (tmp_path / "absent/plan.txt").read_text()
    assert Quant().embedding is None
    assert config.from_tree({"Slim": {"quant": {}}}, "test").Slim.quant.embedding is None
