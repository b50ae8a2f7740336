"""The reproduction of Persona-judge: its language, its average of two laws, its test of laws."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import ModelPredictor, Prompts, chain, decode
from tokjax.models.config import ModelConfig
from tokjax.models.transformer import Transformer
from tokjax.reproduction import Measurements
from tokjax.reproduction.plan import PLANS

config = runpy.run_path(str(PLANS / "persona_judge.py"))


def test_reviews_say_what_their_control_word_asks_for():
    rng = np.random.default_rng(0)
    told = {
        control: np.array(
            [config["attributes"](config["review"](control, rng)) for _ in range(400)]
        ).mean(0)
        for control in config["CONTROLS"]
    }
    assert told["<short>"][0] < 1.7 < 2.2 < told["<vivid>"][0] < 3.1 < told["<long>"][0]
    assert told["<plain>"][1] < 0.3 < 0.4 < told["<short>"][1] < 0.6 < 0.7 < told["<vivid>"][1]
    words = {word for c in config["CONTROLS"] for word in config["review"](c, rng).split()}
    assert words <= set(config["WORDS"])


def test_a_text_cut_before_its_end_has_attributes_too():
    clauses, vivid = config["attributes"]("it had a icy cover and the")
    assert (clauses, vivid) == (2, 1)
    assert np.isnan(config["attributes"]("it had")[1])


def test_the_average_of_two_equal_laws_is_that_law_and_rows_have_prompts_of_their_own():
    model = Transformer(ModelConfig(vocab_size=31, d_model=32, n_layers=2, n_heads=2))
    params = model.init(jax.random.key(0))
    first, second = Prompts.of([[1, 2, 3], [4, 5]]), Prompts.of([[6], [7, 8, 9, 10]])

    def written(one, other):
        given = config["AverageParams"](params, other)
        return decode(config["Average"](ModelPredictor(model)), given, one, max_new_tokens=6)

    alone = decode(model, params, first, max_new_tokens=6, transform=chain(*config["FILTERS"]))
    assert written(first, first).rows() == alone.rows()
    found = written(first, second)
    assert found.rows() == written(second, first).rows()
    texts = np.asarray(found.tokens)
    for b in range(2):
        laws = []
        for prompt in ([[1, 2, 3], [4, 5]][b], [[6], [7, 8, 9, 10]][b]):
            whole = jnp.array([[*prompt, *texts[b, :5]]])
            x = model.backbone(params, model.embed(params, whole)).x
            logits = model.unembed(params, x)[0, len(prompt) - 1 :]
            for each in config["FILTERS"]:
                logits = each.apply(logits)
            laws.append(jax.nn.softmax(logits, axis=-1))
        assert (np.argmax((laws[0] + laws[1]) / 2, axis=-1) == texts[b, :6]).all()


def measured(rng, ending, vividness):
    clauses = rng.geometric(ending, 600).astype(float)
    return {"clauses": clauses, "vivid": rng.binomial(clauses.astype(int), vividness) / clauses}


def test_equal_laws_pass_and_others_are_told_apart():
    rng = np.random.default_rng(1)
    found = Measurements(
        {
            "short": {0: measured(rng, 0.7, 0.5), 1: measured(rng, 0.6, 0.5)},
            "same": {0: measured(rng, 0.7, 0.5), 1: measured(rng, 0.6, 0.5)},
            "longer": {0: measured(rng, 0.5, 0.5), 1: measured(rng, 0.4, 0.5)},
            "vivid": {0: measured(rng, 0.7, 0.7), 1: measured(rng, 0.6, 0.7)},
        },
        {},
    )
    assert min(config["p_values"](found, "same", "short")) > 0.01
    assert max(config["p_values"](found, "longer", "short")) < 1e-3
    assert max(config["p_values"](found, "vivid", "short")) < 1e-3


@pytest.mark.parametrize("scale", ["smoke", "full"])
def test_every_arm_has_random_seeds_of_its_own(scale):
    numbers = [arm.options["number"] for arm in config["get_plan"](scale).arms.values()]
    assert len(set(numbers)) == len(numbers)
