"""Tasks: formats by hand, answers worked out twice, and checkers that can say no."""

import random
import re
from itertools import pairwise

import pytest

from lcm.data import tasks
from lcm.data.tasks import arithmetic, hinted, lists, pcfg, scan
from lcm.errors import ConfigError, DataError

REASONING = ("addition", "sum", "polynomial", "sort", "sort_digits", "parity", "lego")
SPECS = [
    *tasks.TASKS,
    *(f"{name},scratchpad=all" for name in (*REASONING, "lego_permuted")),
    "addition,scratchpad=comp+out",
    "modular,brackets=true",
    "addition_hinted,reversed_digits=false",
    "addition_hinted,hints=false",
    "addition_hinted,spaces=0.3",
    "ngram,n=3",
]


@pytest.fixture(params=SPECS)
def spec(request):
    return request.param


def drawn(task, part, size=60, seed=0):
    return task.draw(tasks.span(getattr(task, part)), size, seed, part)


def corruptions(rng, words, vocabulary):
    """An answer with one word changed, one left out, and one more."""
    at = rng.randrange(len(words))
    other = rng.choice([word for word in vocabulary if word != words[at]])
    yield [*words[:at], other, *words[at + 1 :]]
    yield [*words[:at], *words[at + 1 :]]
    yield [*words, rng.choice(vocabulary)]


@pytest.mark.parametrize("part", ["train", "test"])
def test_checker_agrees_with_the_generator_and_rejects_what_differs(spec, part):
    task, rng = tasks.make(spec), random.Random(0)
    split, vocabulary = task.vocabulary.split, task.vocabulary.words
    for prompt, target, length in drawn(task, part):
        assert length in tasks.span(getattr(task, part))
        assert task.check(prompt, target)
        assert task.check(prompt, "  ".join(split(target)))  # however it is spaced
        assert split(task.final(target)) == split(task.solve(prompt))
        answer = split(task.final(target))
        shown = target[: len(target) - len(task.final(target))]
        for wrong in corruptions(rng, answer, vocabulary):
            # Of "The answer is 7 2." the mark at the end may be all that is left out.
            assert not task.check(prompt, f"{shown} {' '.join(wrong)}"), (prompt, wrong)
    assert not task.check(prompt, "")
    assert not task.check(prompt, "\N{SNOWMAN}")


def test_examples_depend_on_seed_part_and_index_alone(spec):
    task = tasks.make(spec)
    examples, again = drawn(task, "train"), drawn(tasks.make(spec), "train")
    backwards = [examples[index] for index in reversed(range(60))]
    assert [again[index] for index in range(60)] == backwards[::-1]
    assert list(drawn(task, "train", seed=1)) != list(examples)
    assert not {e.prompt for e in examples if e.length >= task.test[0]}


def test_text_comes_back_from_its_ids(spec):
    task = tasks.make(spec)
    words = task.vocabulary
    assert len(set(words.words)) == len(words.words)
    for prompt, target, _ in drawn(task, "test", 10):
        for text in (prompt, target):
            ids = words.encode(text)
            assert ids.min() >= 2 and ids.max() < words.vocab_size
            assert words.split(words.decode(ids)) == words.split(text)
            _, sizes = words.encode_aligned(text)
            assert sizes.sum() == len(text.encode()) and (sizes > 0).all()


def test_lengths_are_drawn_evenly(spec):
    task = tasks.make(spec)
    if isinstance(task, scan.Scan):
        pytest.skip("enumerated, not drawn")
    lengths = tasks.span(task.train)
    cells = sum(len(task.cells(n)) for n in lengths)
    seen = [e.length for e in task.draw(lengths, 2 * cells, 0, "train")]
    assert {n: seen.count(n) for n in lengths} == {n: 2 * len(task.cells(n)) for n in lengths}


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("copy_rsc", "Copy: a1 a1 a1 [SEP] ", "a1 a1 a1"),
        ("copy_rsc2x", "Copy: a1 a1 [SEP] ", "a1 a1 a1 a1"),
        ("copy_rdc", "Replace a1 with b2 in a1 a1 a1 [SEP] ", "b2 b2 b2"),
        ("copy_cmc", "Copy: a1 b2 c3 [SEP] ", "a1 b2 c3"),
        ("copy_cmc2x", "Copy: a1 b2 [SEP] ", "a1 b2 [NEXT] a1 b2"),
        ("reverse_mc", "Reverse: a1 b2 c3 [SEP] ", "c3 b2 a1"),
        ("reverse_mc2x", "Reverse: a1 b2 [SEP] ", "b2 a1 [NEXT] b2 a1"),
        ("reverse_mcrv", "Reverse: a1 b2 [SEP] ", "b2 a1 [NEXT] a1 b2"),
        ("addition", "Compute 5 3 + 1 9 ? ", "The answer is 7 2."),
        ("polynomial", "Evaluate at x = 2 in 3 * x ** 2 + - 1 * x ** 0 ? ", "The answer is 1."),
        ("polynomial", "Evaluate at x = - 2 in 1 * x ** 3 ? ", "The answer is 2."),
        ("sort", "Sort the following list [ b0, a3, a0 ]. ", "The sorted list is [ a0, a3, b0 ]."),
        ("sort_digits", "Sort the following list [ 7 0, 9 ]. ", "The sorted list is [ 9, 7 0 ]."),
        ("sum", "Compute: 5 + 3 . ", "The answer is 8 ."),
        ("sum", "Compute: 9 + 9 + 7 . ", "The answer is 5 ."),
        ("parity", "Is the number of 1's even in the sequence [ 1, 0 ] ? ", "The answer is No."),
        ("lego", "If b = - a, a = +1. Then, what is the value of b? ", "The answer is -1."),
        ("lego", "If a = -1, b = - a. Then, what is the value of b? ", "The answer is +1."),
        ("scan", "Solve: walk after turn right [SEP] ", "Right Walk"),
        ("pcfg", "Solve: append reverse A1 B2 , C3 [SEP] ", "B2 A1 C3"),
        ("ngram", "find a1 b2 : c3 a1 b2 c5 a1 | ", "c5"),
        ("induction", "a1 ? a7 a2 ? ", "a7"),
        ("mqar", "k1 v5 k2 v6 | k2 k1 | ", "v6 v5"),
        ("count", "count a1 : a1 a2 a1 | ", "2"),
        ("mode", "a1 a2 a2 | ", "a2"),
        ("majority", "1 0 1 0 | ", "No"),
        ("modular", "1 + 2 * 3 | ", "2"),
        ("modular", "( 1 - 3 ) * 2 | ", "1"),
        ("dyck", "( [ ] { | ", "} )"),
        ("dyck_shuffle", "( [ ) { | ", "] }"),
    ],
)  # fmt: skip
def test_answers_by_hand(name, prompt, answer):
    task = tasks.make(name)
    assert task.vocabulary.split(task.solve(prompt)) == task.vocabulary.split(answer)
    assert task.check(prompt, answer)


def test_scratchpads_by_hand():
    """The steps quoted in the literature, digits spaced."""
    task = tasks.make("addition,scratchpad=all")
    text = task.target(arithmetic._carries(53, 19), "The answer is 7 2.")
    expected = (
        "Thinking step by step:  in 3, 9 comp 3 + 9 + carry = 1 2 + 0 = 1 2 out 2 [ carry: 1 ] "
        "re 5 + 1 # in 5, 1 comp 5 + 1 + carry = 6 + 1 = 7 out 7 [ carry: 0 ] re + . Thus, "
        "The answer is 7 2."
    )
    assert text == expected
    last = list(arithmetic._carries(9, 1))[-1]
    assert (last.input, last.output, last.variables) == ("0, 0", "1", "carry: 0")
    parity = next(tasks.make("parity")._steps([1, 0, 1])).text({"in", "comp", "out", "vars", "re"})
    assert parity == "in 1 comp 1 ** par = 1 ** 0 out 1 [ par: 1 ] re [ 0, 1 ]"
    total = list(tasks.make("sum")._steps([3, 5]))[1].text({"comp", "out", "vars"})
    assert total == "comp 5 + sum = 5 + 3 = out 8 [ sum: 8 = 8 ]"


@pytest.mark.parametrize("field", ["in", "comp", "out", "vars", "re"])
@pytest.mark.parametrize("name", REASONING)
def test_each_field_can_be_left_out(name, field):
    marks = {"in": "in", "comp": "comp", "out": "out", "vars": "[ ", "re": "re"}
    rest = "+".join(mark for mark in marks if mark != field)
    full, less = tasks.make(f"{name},scratchpad=all"), tasks.make(f"{name},scratchpad={rest}")
    long, short = (task.draw([4], 1, 0, "train")[0] for task in (full, less))
    assert long.prompt == short.prompt
    variables = not (field == "vars" and name in ("sort", "sort_digits", "lego"))
    assert (len(short.target) < len(long.target)) == variables  # sort and LEGO have none
    assert full.check(long.prompt, short.target)  # the answer alone counts
    assert not full.check(long.prompt, full.solve(long.prompt))  # but must follow the steps


def test_selection_sort_takes_the_least():
    outputs = [step.output for step in tasks.make("sort")._steps([3, 1, 2, 1])]
    assert outputs == [lists.RANKED[rank] for rank in (1, 1, 2, 3)]


def test_scan_has_the_published_commands():
    commands = scan.commands()
    assert len(commands) == 20_910
    task = tasks.make("scan")
    train, test = drawn(task, "train", 10**6), drawn(task, "test", 10**6)
    assert (len(train), len(test)) == (15_997, 3_136)
    assert max(len(actions) for actions in commands.values()) == 48
    validation = task.draw(tasks.span(task.train), 10**6, 0, "test")
    assert len(validation) == 1_777
    assert not {e.prompt for e in train} & {e.prompt for e in validation + test}
    by_original = sum(len(actions) <= 22 for actions in commands.values())
    assert by_original == 16_990  # the training set of the original length split
    for example in random.Random(0).sample(train, 300):
        assert task.check(example.prompt, example.target)


@pytest.mark.parametrize(
    ("command", "actions"),
    [
        ("jump around right", "Right Jump " * 4),
        ("turn opposite left", "Left Left"),
        ("run thrice", "Run Run Run"),
        ("look opposite right", "Right Right Look"),
        ("jump opposite left after walk around left", "Left Walk " * 4 + "Left Left Jump"),
        ("walk left twice and run", "Left Walk Left Walk Run"),
    ],
)
def test_scan_commands_by_hand(command, actions):
    assert list(scan.commands()[command]) == actions.split() == scan.interpret(command.split())


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("copy A1 B1 C1", "A1 B1 C1"),
        ("reverse A1 B1 C1", "C1 B1 A1"),
        ("shift A1 B1 C1", "B1 C1 A1"),
        ("swap_first_last A1 B1 C1 D1", "D1 B1 C1 A1"),
        ("swap_first_last A1", "A1"),
        ("echo A1 B1", "A1 B1 B1"),
        ("repeat A1 B1", "A1 B1 A1 B1"),
        ("append A1 B1 , C1", "A1 B1 C1"),
        ("prepend A1 B1 , C1", "C1 A1 B1"),
        ("remove_first A1 , B1", "B1"),
        ("remove_second A1 , B1", "A1"),
        ("echo append copy Q10 E4 , shift A1 B1", "Q10 E4 B1 A1 A1"),
        ("append append A1 , B1 , reverse C1 D1", "A1 B1 D1 C1"),
    ],
)
def test_string_functions_by_hand(expression, result):
    assert pcfg.evaluate(expression.split()) == result.split()


def test_string_functions_are_counted_and_kept_short():
    for prompt, target, length in drawn(tasks.make("pcfg"), "test", 100):
        names = [w for w in prompt.split() if w in pcfg.UNARY or w in pcfg.BINARY]
        assert len(names) == length and len(target.split()) <= pcfg.LONGEST


def test_lego_asks_for_the_second_half_of_a_chain():
    chain, permuted = tasks.make("lego"), tasks.make("lego_permuted")
    shuffled = 0
    for one, two in zip(drawn(chain, "test"), drawn(permuted, "test"), strict=True):
        names = re.findall(r"(\w) = ", one.prompt)
        assert len(set(names)) == one.length
        assert names.index(one.prompt.split()[-1].strip("?")) >= one.length // 2
        assert sorted(names) == sorted(re.findall(r"(\w) = ", two.prompt))
        shuffled += one.prompt != two.prompt
    assert shuffled > 50


def test_addition_has_every_pair_of_lengths_once_a_round():
    pairs = [
        tuple(len(side.split()) for side in e.prompt[8:-3].split(" + "))
        for e in tasks.make("addition").draw(range(1, 9), 64, 0, "train")
    ]
    assert sorted(pairs) == [(a, b) for a in range(1, 9) for b in range(1, 9)]


def sides(text):
    """Markers and digits of the operands or of an answer."""
    words = [side.split() for side in text.replace("_", "").rstrip(" =").split("+")]
    return [(side[::2], side[1::2]) for side in words]


def value(digits):
    """The number of digits written from the least significant on."""
    return int("".join(reversed(digits)))


@pytest.mark.parametrize("spaces", ["0", "0.3"])
def test_hinted_addition_is_addition_and_its_hints_belong_to_places(spaces):
    starts, blanks = set(), 0
    task = tasks.make(f"addition_hinted,spaces={spaces}")
    for prompt, target, length in drawn(task, "test", 200):
        (markers_a, a), (markers_b, b) = sides(prompt)
        ((markers, total),) = sides(target)
        assert value(a) + value(b) == value(total)
        assert len(a) == len(b) == length and len(total) == length + 1
        assert markers_a == markers_b == markers[:-1]
        places = [hinted.MARKERS.index(marker) for marker in markers]
        assert all(y == x + 1 for x, y in pairwise(places))
        starts.add(places[0])
        blanks += "_" in prompt
    assert len(hinted.MARKERS) == len(set(hinted.MARKERS)) == 102
    assert len(starts) > 20
    assert (blanks > 190) == (spaces != "0") and (blanks == 0) == (spaces == "0")


def test_hinted_addition_by_hand():
    task = tasks.make("addition_hinted")
    assert task.check("a 6 b 7 c 5 + a 1 b 6 c 3 = ", "a 7 b 3 c 9 d 0")
    assert not task.check("a 6 b 7 c 5 + a 1 b 6 c 3 = ", "a 7 b 3 c 9")
    plain = tasks.make("addition_hinted,reversed_digits=false")
    assert plain.check("b 5 c 7 d 6 + b 3 c 6 d 1 = ", "a 0 b 9 c 3 d 7")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("adition", "task 'adition' is unknown: choose from"),
        ("addition,trian=1-4", "has no field 'trian': it has train, test"),
        ("addition,train=1-9", "train lengths 1-9 and test lengths 9-16 of Addition overlap"),
        ("addition,train=8-1", "train lengths 8-1"),
        ("lego,train=1-8", "train lengths 1-8 of Lego are no range from 2 up"),
        ("addition,train=four", "train='four' cannot be read: write it like train=1-8"),
        ("sort,multi_digit=perhaps", "multi_digit='perhaps'"),
        ("parity,scratchpad=in+outt", "names 'outt'"),
        ("copy_rsc,symbols=101", "symbols=101 must lie from 2 to 100"),
        ("addition_hinted,test=41-102", "needs 103 markers"),
        ("mqar,symbols=8", "symbols=8 of Mqar must lie from 32"),
        ("parity,size=0", "size=0"),
    ],
)
def test_what_cannot_be_is_refused(spec, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        tasks.make(spec)


def test_a_length_without_examples_is_refused():
    with pytest.raises(DataError, match="no test examples of lengths"):
        tasks.make("scan").draw([29], 10, 0, "test")


def test_foreign_words_are_refused():
    with pytest.raises(DataError, match="'zebra' of 'Copy: zebra' is no word"):
        tasks.make("copy_rsc").vocabulary.encode("Copy: zebra")
