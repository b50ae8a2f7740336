import json
import textwrap
import typing

import numpy as np
import pytest

from tokjax.data.config import DataConfig
from tokjax.data.encoding import Encoder
from tokjax.data.prepare import prepare
from tokjax.data.sources import JsonlSource, SeqioSource, TextSource, TfdsSource
from tokjax.data.store import TokenStore
from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer
from tokjax.errors import ConfigError, DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

DATA = DataConfig(tokenizer=TokenizerConfig(name="bytes"))


@pytest.fixture(scope="module")
def tasks():
    from tokjax.data.prepare import quieten_tensorflow

    quieten_tensorflow()
    from tokjax.data import tasks

    return tasks


@pytest.fixture(scope="module")
def seqio(tasks):
    return pytest.importorskip("seqio")


@pytest.fixture(scope="module")
def tf(tasks):
    return pytest.importorskip("tensorflow")


@pytest.fixture
def registered(seqio):
    """Forgets what a test registers."""
    before = set(seqio.TaskRegistry.names()), set(seqio.MixtureRegistry.names())
    yield
    for registry, names in zip((seqio.TaskRegistry, seqio.MixtureRegistry), before, strict=True):
        for name in set(registry.names()) - names:
            registry.remove(name)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    tokenizer = build_tokenizer(TokenizerConfig(name="bytes"), tmp_path_factory.mktemp("cache"))
    return Encoder(tokenizer, (256,), (256,))


def lines(tmp_path, text, name="a.txt"):
    (tmp_path / name).write_text(text)
    return TextSource(files=(str(tmp_path / name),), per="line")


def sequences(store):
    return [store.tokens(i).tolist() for i in range(store.num_examples)]


def test_a_source_is_a_seqio_task(tmp_path, tasks, seqio, encoder, registered):
    tasks.register_task("tokjax_test_lines", lines(tmp_path, "ab\nc\n"), encoder)
    task = seqio.get_mixture_or_task("tokjax_test_lines")
    elements = list(task.get_dataset(split="all", shuffle=False).as_numpy_iterator())
    assert [e["tokens"].tolist() for e in elements] == [[256, 97, 98, 256], [256, 99, 256]]
    assert [e["weights"].tolist() for e in elements] == [[1.0] * 4, [1.0] * 3]
    assert [int(e["num_bytes"]) for e in elements] == [2, 1]
    assert elements[1]["name"].decode() == f"{tmp_path}/a.txt:2"
    vocabulary = task.output_features["tokens"].vocabulary
    assert vocabulary.decode(elements[0]["tokens"].tolist()) == "ab"
    for name, message in (("tokjax_test_lines", "already"), ("tokjax/test", "may hold letters")):
        with pytest.raises(ConfigError, match=message):
            tasks.register_task(name, lines(tmp_path, "ab\n"), encoder)


def test_tasks_mix_at_their_rates(tmp_path, tasks, encoder, registered):
    tasks.register_task("tokjax_test_a", lines(tmp_path, "a\n", "a.txt"), encoder)
    tasks.register_task("tokjax_test_b", lines(tmp_path, "b\n", "b.txt"), encoder)
    tasks.register_mixture("tokjax_test_mix", {"tokjax_test_a": 3.0, "tokjax_test_b": 1.0})
    source = SeqioSource(task="tokjax_test_mix", split="all", examples=400)
    store = TokenStore.open(prepare(source, DATA, cache_dir=tmp_path / "cache", progress=False))
    assert store.num_examples == 400
    drawn = [int(s[1]) for s in sequences(store)]
    assert set(drawn) == {97, 98}
    assert 260 < drawn.count(97) < 340  # 300 expected, standard deviation 8.7
    assert store.example_name(0).startswith(str(tmp_path))
    with pytest.raises(ConfigError, match="without end: set examples"):
        prepare(SeqioSource(task="tokjax_test_mix", split="all"), DATA, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"tokjax_test_nome": 1.0}, "'tokjax_test_none'"),
        ({"tokjax_test_none": 0.0}, "above 0"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(tmp_path, tasks, encoder, registered, rates, message):
    tasks.register_task("tokjax_test_none", lines(tmp_path, "ab\n"), encoder)
    with pytest.raises(ConfigError, match=message):
        tasks.register_mixture("tokjax_test_bad", rates)


def test_a_bad_record_keeps_its_class_and_words_through_tensorflow(tmp_path, tasks):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    source = JsonlSource(files=(str(tmp_path / "a.jsonl"),))
    message = r"^.*a\.jsonl:2: field 'text' is not text: it is 5\. Mend .* on_error='skip'"
    with pytest.raises(DataError, match=message):
        prepare(source, DATA, cache_dir=tmp_path / "cache", progress=False)
    assert [p for p in (tmp_path / "cache" / "stores").iterdir() if p.is_dir()] == []


def dataset_of(tf, features):
    def make(split, shuffle_files=False, seed=None):
        rows = features() if callable(features) else features
        kinds = {k: tf.as_dtype(np.asarray(v).dtype) for k, v in rows[0].items()}
        signature = {k: tf.TensorSpec([None], kind) for k, kind in kinds.items()}
        return tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=signature)

    return make


def register(seqio, tf, name, rows, vocabulary):
    features = {
        key: seqio.Feature(
            vocabulary if key != "weights" else seqio.PassThroughVocabulary(1),
            add_eos=False,
            dtype=tf.as_dtype(value.dtype),
        )
        for key, value in rows[0].items()
    }
    source = seqio.FunctionDataSource(dataset_of(tf, rows), splits=["train"])
    seqio.TaskRegistry.add(name, source=source, preprocessors=[], output_features=features)


def row(**features):
    return {k: np.array(v, np.float32 if k == "weights" else np.int32) for k, v in features.items()}


def read(tmp_path, **settings):
    data = DATA if "data" not in settings else settings.pop("data")
    source = SeqioSource(task="tokjax_test_theirs", **settings)
    return TokenStore.open(prepare(source, data, cache_dir=tmp_path, progress=False))


def test_a_registered_task_gives_inputs_no_weight(tmp_path, seqio, tf, encoder, registered):
    from tokjax.data.vocabularies import SeqioVocabulary

    rows = [row(inputs=[97, 98], targets=[99]), row(inputs=[], targets=[100, 101])]
    register(seqio, tf, "tokjax_test_theirs", rows, SeqioVocabulary(encoder.tokenizer))
    store = read(tmp_path)
    assert sequences(store) == [[256, 97, 98, 99, 256], [256, 100, 101, 256]]
    assert store.weights(0).tolist() == [0, 0, 0, 1, 1]
    assert store.weights(1).tolist() == [0, 1, 1, 1]
    assert store.example_name(1) == "tokjax_test_theirs#1"
    assert store.manifest["counts"]["bytes"] == 5


def test_weights_of_a_registered_task_are_kept(tmp_path, seqio, tf, encoder, registered):
    from tokjax.data.vocabularies import SeqioVocabulary

    rows = [
        row(targets=[99, 100], weights=[0.5, 0.25]),
        row(targets=[99], weights=[1, 1]),
        row(targets=[99], weights=[np.nan]),
        row(targets=[], weights=[]),
        row(targets=[257], weights=[1]),
    ]
    register(seqio, tf, "tokjax_test_theirs", rows, SeqioVocabulary(encoder.tokenizer))
    store = read(tmp_path, data=DataConfig(tokenizer=DATA.tokenizer, on_error="skip"))
    assert sequences(store) == [[256, 99, 100, 256]]
    assert store.weights(0).tolist() == [0, 0.5, 0.25, 0.25]
    assert len(store.manifest["skipped"]) == 4


def test_ids_of_another_vocabulary_are_not_taken_silently(tmp_path, seqio, tf, registered):
    vocabulary = seqio.ByteVocabulary()  # byte b has the id b + 3
    register(seqio, tf, "tokjax_test_theirs", [row(targets=[100, 101])], vocabulary)
    with pytest.raises(ConfigError, match="ids='retokenize'"):
        read(tmp_path)
    assert sequences(read(tmp_path, ids="retokenize")) == [[256, 97, 98, 256]]
    assert sequences(read(tmp_path, ids="as_is")) == [[256, 100, 101, 256]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "tran"}, "no split 'tran'.*'train'"),
        ({"targets": "tragets"}, "no feature 'tragets'.*'targets'"),
        ({"module": "no.such.module"}, "cannot import no.such.module"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_one(
    tmp_path, seqio, tf, registered, settings, message
):
    vocabulary = seqio.PassThroughVocabulary(300)
    register(seqio, tf, "tokjax_test_theirs", [row(targets=[5])], vocabulary)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, ids="as_is", **settings)
    with pytest.raises(
        ConfigError, match=r"no seqio task or mixture 'tokjax_test_thiers'.*module="
    ):
        prepare(SeqioSource(task="tokjax_test_thiers"), DATA, cache_dir=tmp_path, progress=False)


def test_a_task_is_registered_by_importing_its_module(tmp_path, monkeypatch, seqio, registered):
    (tmp_path / "their_tasks.py").write_text(
        textwrap.dedent(
            """
            import seqio
            import tensorflow as tf

            def rows(split, shuffle_files=False, seed=None):
                return tf.data.Dataset.from_tensors({"targets": tf.constant([97, 98])})

            seqio.TaskRegistry.add(
                "tokjax_test_from_module",
                source=seqio.FunctionDataSource(rows, splits=["train"]),
                preprocessors=[],
                output_features={
                    "targets": seqio.Feature(seqio.PassThroughVocabulary(300), add_eos=False)
                },
            )
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = SeqioSource(task="tokjax_test_from_module", module="their_tasks", ids="as_is")
    store = TokenStore.open(prepare(source, DATA, cache_dir=tmp_path / "cache", progress=False))
    assert sequences(store) == [[256, 97, 98, 256]]
    assert store.weights(0).tolist() == [1, 1, 1, 1]


@pytest.fixture(scope="module")
def tiny_dataset(tasks, tmp_path_factory):
    """A data set of TensorFlow Datasets, built on disk: its class is not needed to read it."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TokjaxTiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos: typing.ClassVar = {}  # nothing to download

        def _info(self):
            features = {
                "question": tfds.features.Text(),
                "answer": tfds.features.Text(),
                "chat": tfds.features.Sequence(
                    {"role": tfds.features.Text(), "content": tfds.features.Text()}
                ),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {
                "train": self._generate_examples(range(5)),
                "test": self._generate_examples([9]),
            }

        def _generate_examples(self, numbers):
            for i in numbers:
                chat = [{"role": "user", "content": "é"}, {"role": "assistant", "content": str(i)}]
                yield i, {"question": f"{i}?", "answer": f"{i}!", "chat": chat}

    root = tmp_path_factory.mktemp("tfds")
    TokjaxTiny(data_dir=root).download_and_prepare()
    return root


def test_a_tfds_data_set_is_a_source(tmp_path, tiny_dataset):
    source = TfdsSource(
        dataset="tokjax_tiny",
        data_dir=str(tiny_dataset),
        split="train[:3]",
        kind="response",
        prompt="question",
        response="answer",
    )
    directory = prepare(source, DATA, cache_dir=tmp_path, progress=False)
    store = TokenStore.open(directory)
    assert directory.name.startswith("tfds-train_3-")
    assert store.num_examples == 3
    assert store.example_name(2) == "tokjax_tiny/train[:3]#2"
    for i, tokens in enumerate(sequences(store)):
        number = tokens[1]
        assert tokens == [256, number, ord("?"), number, ord("!"), 256]
        assert store.weights(i).tolist() == [0, 0, 0, 1, 1, 1]


def test_a_tfds_chat_is_read_by_message(tmp_path, tiny_dataset):
    source = TfdsSource(
        dataset="tokjax_tiny",
        data_dir=str(tiny_dataset),
        split="test",
        kind="messages",
        messages="chat",
    )
    store = TokenStore.open(prepare(source, DATA, cache_dir=tmp_path, progress=False))
    text = bytes(store.tokens(0)[1:-1].tolist()).decode()
    assert "user\né<|im_end|>" in text
    weighted = store.tokens(0)[store.weights(0) > 0]
    assert bytes(weighted[:-1].tolist()).decode() == "9<|im_end|>"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "tokjax_tyny"}, "no 'tokjax_tyny'"),
        ({"split": "tarin"}, "no split 'tarin'.*'train'"),
        ({"text": "qestion"}, "no feature 'qestion'.*'question'"),
    ],
)
def test_a_wrong_tfds_name_is_an_error_with_a_remedy(tmp_path, tiny_dataset, settings, message):
    settings = {"dataset": "tokjax_tiny", "text": "question", **settings}
    source = TfdsSource(data_dir=str(tiny_dataset), **settings)
    with pytest.raises(ConfigError, match=message):
        prepare(source, DATA, cache_dir=tmp_path, progress=False)


def test_documents_pass_through_features_unchanged(tasks):
    from tokjax.data.sources import Document
    from tokjax.data.thinking import Insertion

    documents = [
        Document("a:1", "0" * 16, "é\n"),
        Document("b", "f" * 16, "", None, ({"role": "user", "content": "x"},), 0.5, True),
        Document("c", "1" * 16, "abc", ((0, 1, 0.5), (1, 2, 2.0))),
        Document("d", "2" * 16, "ab", ((0, 2, 1.0),), insertion=Insertion(("<T>",), 2, (1,))),
    ]
    for document in documents:
        features = tasks._to_features(document)
        assert json.loads(features["facts"])["name"] == document.name
        back = tasks._from_features(**features)
        assert (back.text, back.weights, back.messages) == (
            document.text,
            document.weights,
            document.messages,
        )
        assert (back.key, back.end_weight) == (document.key, document.end_weight)
        assert back.insertion == document.insertion
