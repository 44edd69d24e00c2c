import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.data.collate import IGNORE, TokenBatch, collate_pairs
from modern_llm.data.loader import (
    BucketLoader,
    PackedLoader,
    TextLoader,
    mixture_weights,
    validation_batches,
)
from modern_llm.data.packing import PackedRows, TextRows, pack
from modern_llm.data.store import TokenStore, build_store
from modern_llm.errors import ConfigError
from modern_llm.runtime.ranks import Ranks

BOS, EOS, PAD = 1, 2, 0
FAST = settings(max_examples=40, deadline=None)
Records = list[tuple[list[int], ...]]


class Stores:
    """Builds stores whose tokens tell where they are from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, segments: tuple[str, ...], records: Records) -> TokenStore:
        return build_store(
            self.folder,
            segments=segments,
            key={"records": records},
            records=iter(records),
            n_vocab=60000,
            pad_id=PAD,
        )

    def text(self, lengths: list[int], first: int = 10) -> TokenStore:
        ids = itertools.count(first)
        return self.make(("text",), [([BOS, *itertools.islice(ids, n), EOS],) for n in lengths])

    def answers(self, lengths: list[tuple[int, int]]) -> TokenStore:
        """Example i holds only the token 10 + i, but for its markers."""
        return self.make(
            ("prompt", "answer"),
            [([BOS] + [10 + i] * p, [10 + i] * a + [EOS]) for i, (p, a) in enumerate(lengths)],
        )

    def pairs(self, lengths: list[int]) -> TokenStore:
        return self.make(
            ("prompt", "chosen", "rejected"),
            [([BOS, 9], [10] * n, [11] * (n + 1)) for n in lengths],
        )


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return Stores(tmp_path_factory.mktemp("stores"))


SIZES = {"batch_size": 4, "micro_batch_size": 2, "seed": 3}


def text_loader(store: TokenStore, **options: object) -> TextLoader:
    return TextLoader([store], [None], **({"seq_len": 5} | SIZES | options))


# ---- text


def test_text_blocks_and_next_tokens(stores: Stores) -> None:
    store = stores.text([7, 3, 11])
    stream = store.tokens.tolist()
    loader = text_loader(store)
    seen = Counter()
    n_blocks = -(-(len(stream) - 1) // 5)
    for step in range(n_blocks):  # batch_size epochs
        for batch in loader.batches(step):
            assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64
            assert batch.doc_ids_BT is None and batch.n_tokens == 10
            for tokens, labels in zip(
                batch.tokens_BT.tolist(), batch.labels_BT.tolist(), strict=True
            ):
                at = next(i for i in range(0, len(stream), 5) if stream[i] == tokens[0])
                inside = stream[at : at + 6]
                assert tokens == (inside + [PAD] * 5)[:5]
                assert labels == (inside[1:] + [IGNORE] * 5)[:5]
                seen[at] += 1
    assert set(seen.values()) == {4} and len(seen) == n_blocks


@FAST
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), seq_len=st.integers(1, 9))
def test_document_mask(stores: Stores, lengths: list[int], seq_len: int) -> None:
    store = stores.text(lengths)
    stream = store.tokens.tolist()
    rows = TextRows(store, seq_len, doc_mask=True)
    tokens, labels, docs, pos = rows.read(np.arange(len(rows)))
    learned = []
    for block in range(len(rows)):
        doc, place = -1, 0
        for t in range(seq_len):
            at = block * seq_len + t
            if at >= len(stream):
                assert (tokens[block, t], labels[block, t], docs[block, t]) == (PAD, IGNORE, -1)
                continue
            if t == 0 or stream[at] == BOS:
                doc, place = doc + 1, 0
            assert tokens[block, t] == stream[at]
            assert (docs[block, t], pos[block, t]) == (doc, place)
            place += 1
            follows = at + 1 < len(stream) and stream[at + 1] != BOS
            assert labels[block, t] == (stream[at + 1] if follows else IGNORE)
            learned += [at + 1] if follows else []
    assert learned == [i for i, token in enumerate(stream) if token != BOS]


@FAST
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    seq_len=st.integers(1, 7),
    micro=st.integers(1, 4),
    world=st.integers(1, 3),
)
def test_validation_pass_scores_each_token_once(
    stores: Stores, lengths: list[int], seq_len: int, micro: int, world: int
) -> None:
    two = [stores.text(lengths), stores.text(lengths[::-1], first=2000)]
    passes = []
    for rank in range(world):
        loader = TextLoader(
            two, [0.5, 0.5], seq_len=seq_len, batch_size=micro * world, micro_batch_size=micro,
            seed=1, ranks=Ranks(rank, rank, world),
        )  # fmt: skip
        passes += [validation_batches(loader)] * 2
    tokens = [[batch.tokens_BT.tolist() for batch in one] for one in passes]
    assert all(one == tokens[0] for one in tokens)  # on every rank, and each time
    labels = Counter()
    for batch in passes[0]:
        labels.update(batch.labels_BT[batch.labels_BT != IGNORE].tolist())
    expected = Counter()
    for store in two:
        expected.update(store.tokens[1:].tolist())
    assert labels == expected


def test_text_shorter_than_a_block_is_padded(stores: Stores) -> None:
    (batch,) = validation_batches(text_loader(stores.text([3]), seq_len=50))
    assert int((batch.labels_BT != IGNORE).sum()) == 4


def test_mixture_shares(stores: Stores) -> None:
    first, second = stores.text([400]), stores.text([900], first=5000)
    loader = TextLoader(
        [first, second], [0.3, 0.7], seq_len=5, batch_size=100, micro_batch_size=100, seed=0
    )
    batches = [b for step in range(20) for b in loader.batches(step)]
    starts = torch.cat([b.tokens_BT for b in batches]).max(dim=1).values
    assert int((starts >= 5000).sum()) == 1400  # exact over 1000 slots
    for part in (starts[starts < 5000], starts[starts >= 5000]):
        seen = Counter(part.tolist())  # each store goes through its own epochs
        assert max(seen.values()) - min(seen.values()) <= 1


def test_mixture_without_weights_is_one_epoch_of_all(stores: Stores) -> None:
    two = [stores.text([40]), stores.text([90], first=5000)]
    loader = TextLoader(two, [None, None], seq_len=5, batch_size=2, micro_batch_size=1, seed=0)
    blocks = sum(-(-(s.n_tokens - 1) // 5) for s in two)
    assert loader.steps_per_epoch == -(-blocks // 2)
    slots = loader._rows_of(np.arange(blocks))
    assert sorted(slots.tolist()) == list(range(blocks))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1.0, 3.0], [0.25, 0.75]), ([None, None], None), ([0.4, None], [0.4, 0.6])],
)
def test_mixture_weights(stores: Stores, weights: list[float | None], expected: object) -> None:
    two = [stores.text([298]), stores.text([98], first=500)]  # 300 and 100 tokens
    assert mixture_weights(two, weights) == expected
    with pytest.raises(ConfigError, match="weights for"):
        mixture_weights(two, [1.0])


def test_sources_without_a_weight_share_the_rest_by_size(stores: Stores) -> None:
    lengths = [(98, 0), (298, 1000), (98, 2000)]  # and two markers
    three = [stores.text([n], first=3000 + first) for n, first in lengths]
    assert mixture_weights(three, [None, None, 0.2]) == pytest.approx([0.2, 0.6, 0.2])
    for weights, rule in [
        ([0.5, None, 0.5], "weights sum to 1 and leave nothing"),
        ([2, None, None], "leave nothing to the sources without one"),
        ([1, 1, 1e-4], r"weight=0.0001 is a share of .*, below 0.001"),
    ]:
        with pytest.raises(ConfigError, match=rule):
            mixture_weights(three, weights)


# ---- packing


@FAST
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=200), seed=st.integers(0, 5))
def test_packing_keeps_every_example_once(lengths: list[int], seed: int) -> None:
    examples, starts = pack(np.array(lengths), 32, seed)
    assert sorted(examples.tolist()) == list(range(len(lengths)))
    used = [sum(lengths[e] for e in examples[a:b]) for a, b in itertools.pairwise(starts.tolist())]
    assert max(used) <= 32 and min(used) > 0
    halves = sum(u <= 16 for u in used)
    assert halves <= 1  # two such rows would fit into one


@FAST
@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30),
    seed=st.integers(0, 5),
)
def test_packed_rows(stores: Stores, lengths: list[tuple[int, int]], seed: int) -> None:
    store = stores.answers(lengths)
    rows = PackedRows(store, 16, seed=seed)
    tokens, labels, docs, pos = rows.read(np.arange(len(rows)))
    seen = []
    for r in range(len(rows)):
        at = 0
        for doc, example in enumerate(rows.examples[rows.starts[r] : rows.starts[r + 1]]):
            prompt, answer = (s.tolist() for s in store.record(int(example)))
            n = len(prompt) + len(answer)
            here = slice(at, at + n)
            assert tokens[r, here].tolist() == prompt + answer
            assert labels[r, here].tolist() == [IGNORE] * (len(prompt) - 1) + answer + [IGNORE]
            assert docs[r, here].tolist() == [doc] * n
            assert pos[r, here].tolist() == list(range(n))
            at += n
            seen.append(int(example))
        assert (tokens[r, at:] == PAD).all() and (docs[r, at:] == -1).all()
        assert (labels[r, at:] == IGNORE).all()
    assert sorted(seen) == list(range(len(lengths)))


def packed_loader(store: TokenStore, **options: object) -> PackedLoader:
    return PackedLoader(store, **({"seq_len": 16} | SIZES | options))


def test_packed_loader_and_validation(stores: Stores) -> None:
    store = stores.answers([(i % 5, i % 4) for i in range(40)])
    loader = packed_loader(store)
    total = int(store.lengths()[:, 1].sum())
    counted = sum(int((b.labels_BT != IGNORE).sum()) for b in validation_batches(loader))
    assert counted == total
    batch = loader.batches(0)[0]
    assert batch.doc_ids_BT is not None and batch.n_tokens == int((batch.doc_ids_BT >= 0).sum())


def test_example_longer_than_a_row(stores: Stores) -> None:
    with pytest.raises(ConfigError, match="more than seq_len=16"):
        packed_loader(stores.answers([(10, 10)]))


def test_replay_share(stores: Stores) -> None:
    store = stores.answers([(3, 3)] * 60)
    text = stores.text([900], first=5000)
    loader = packed_loader(store, replay=text, replay_share=0.25)
    batches = [b for step in range(250) for b in loader.batches(step)]
    rows = torch.cat([b.tokens_BT for b in batches])
    replayed = (rows >= 5000).any(dim=1)
    assert int(replayed.sum()) == 250
    labels = torch.cat([b.labels_BT for b in batches])
    assert (labels[replayed] != IGNORE).all(dim=1).float().mean() > 0.9  # all of it is learned
    own = sum(int((b.tokens_BT >= 5000).sum()) for b in validation_batches(loader))
    assert own == 0
    assert loader.steps_per_epoch == -(-len(loader.parts[0]) // 3)
    assert loader.fingerprint != packed_loader(store).fingerprint


# ---- buckets


def test_micro_batches_hold_like_lengths_and_steps_all_of_them(stores: Stores) -> None:
    rng = np.random.default_rng(0)
    store = stores.pairs(rng.integers(1, 60, 640).tolist())
    options = {"batch_size": 16, "micro_batch_size": 2, "seed": 0, "collate": collate_pairs}
    loader = BucketLoader(store, **options)
    assert loader.steps_per_epoch == 40
    epochs = [
        np.concatenate([loader.rows(step) for step in range(e * 40, e * 40 + 40)]) for e in (0, 1)
    ]
    assert all(sorted(rows.tolist()) == list(range(640)) for rows in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    lengths = loader.lengths
    spread = [np.ptp(lengths[b.index_B]) for step in range(40) for b in loader.batches(step)]
    assert np.mean(spread) < 0.1 * np.ptp(lengths)
    means = [lengths[loader.rows(step)].mean() for step in range(40)]
    fair = lengths.std() / np.sqrt(16)  # of the mean of a random draw
    assert 0.7 * fair < np.std(means) < 1.3 * fair
    batch = loader.batches(0)[0]
    assert batch.index_B.tolist() == loader.rows(0)[:2].tolist()
    whole = [i for b in validation_batches(loader) for i in b.index_B.tolist()]
    assert sorted(whole) == list(range(640))
    assert (np.diff(lengths[whole]) >= 0).all()


# ---- what holds for all of them


def loaders(stores: Stores) -> dict[str, Callable[..., object]]:
    text, more = stores.text([57, 31]), stores.text([80], first=3000)
    answers = stores.answers([(i % 5, i % 4) for i in range(37)])
    pairs = stores.pairs([i % 9 for i in range(37)])
    return {
        "text": lambda **o: TextLoader([text], [None], seq_len=5, **o),
        "mixture": lambda **o: TextLoader([text, more], [1.0, 2.0], seq_len=5, doc_mask=True, **o),
        "packed": lambda **o: PackedLoader(answers, seq_len=16, **o),
        "replay": lambda **o: PackedLoader(answers, seq_len=16, replay=text, replay_share=0.2, **o),
        "bucket": lambda **o: BucketLoader(pairs, collate=collate_pairs, **o),
    }


NAMES = ["text", "mixture", "packed", "replay", "bucket"]


def contents(batch: object) -> list[str]:
    """Rows of a batch without padding, as comparable text."""
    if isinstance(batch, TokenBatch):
        return [
            f"{t}{la}"
            for t, la in zip(batch.tokens_BT.tolist(), batch.labels_BT.tolist(), strict=True)
        ]
    return [str(i) for i in batch.index_B.tolist()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_order_does_not_depend_on_ranks_or_micro_batches(stores: Stores, name: str) -> None:
    make = loaders(stores)[name]
    plain = make(batch_size=12, micro_batch_size=12, seed=5)
    for step in (0, 1, 7):
        expected = sorted(row for b in plain.batches(step) for row in contents(b))
        for world, micro in [(1, 3), (2, 3), (3, 2), (4, 1)]:
            found = []
            for rank in range(world):
                ranks = Ranks(rank, rank, world)
                own = make(batch_size=12, micro_batch_size=micro, seed=5, ranks=ranks).batches(step)
                assert len(own) == 12 // world // micro
                found += [row for b in own for row in contents(b)]
            assert sorted(found) == expected


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_pure(stores: Stores, name: str) -> None:
    make = loaders(stores)[name]
    sizes = {"batch_size": 4, "micro_batch_size": 2}
    first, second = make(seed=5, **sizes), make(seed=5, **sizes)
    forward = [[contents(b) for b in first.batches(step)] for step in range(25)]
    backward = [[contents(b) for b in second.batches(step)] for step in reversed(range(25))]
    assert forward == backward[::-1]
    other = make(seed=6, **sizes)
    assert [[contents(b) for b in other.batches(s)] for s in range(25)] != forward
    assert other.fingerprint != first.fingerprint == second.fingerprint


@pytest.mark.parametrize("name", ["text", "packed", "bucket"])
@FAST
@given(batch_size=st.integers(1, 9), seed=st.integers(0, 20))
def test_every_row_once_an_epoch(stores: Stores, name: str, batch_size: int, seed: int) -> None:
    make = loaders(stores)[name]
    loader = make(batch_size=batch_size, micro_batch_size=1, seed=seed)
    whole = make(batch_size=1, micro_batch_size=1, seed=seed)
    n = whole.steps_per_epoch
    assert loader.steps_per_epoch == -(-n // batch_size)
    slots = [row for step in range(-(-2 * n // batch_size)) for row in loader.rows(step).tolist()]
    assert sorted(slots[:n]) == sorted(slots[n : 2 * n]) == list(range(n))


@pytest.mark.parametrize("name", NAMES)
def test_batches_that_do_not_divide(stores: Stores, name: str) -> None:
    told = r"batch_size=10 .* 3 x 2; use micro_batch_size=1, or batch_size=12"
    with pytest.raises(ConfigError, match=told):
        loaders(stores)[name](batch_size=10, micro_batch_size=3, seed=0, ranks=Ranks(0, 0, 2))


def test_slices_of_batches(stores: Stores) -> None:
    batches = text_loader(stores.text([57])).batches(0)
    assert len(batches[:1]) == 1
    assert contents(batches[:1][0]) == contents(batches[0])
