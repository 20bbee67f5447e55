import pytest
from pydantic import ValidationError
from tests.limits import finishes
from tests.rewards.test_simple_rewards import group, score

from sapwood.rewards.numeric import Numeric


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("so 12 + 30 = 42.", "42", 1),
        ("It is 41", "42", 0),
        ("42", 42, 1),
        ("42", 42.0, 1),
        ("1,234,567.5", 1234567.5, 1),
        ("about 1 million, or 12,34", "34", 1),  # no thousands: a list of two
        ("1\u202f234 in French print", "1234", 1),
        ("$1,200", "1200", 1),
        ("-3", "-3", 1),
        ("−3", -3, 1),
        ("10-3", "3", 1),  # a minus between two terms is no sign
        ("- 12 apples", "12", 1),  # nor is the bullet of a list
        ("it costs -$4.50", "-4.5", 1),
        (".5", "0.5", 1),
        ("3/4", "0.75", 1),
        ("1 1/2", "1.5", 1),
        (r"\frac{3}{4}", "3/4", 1),
        (r"-\dfrac12", "-0.5", 1),
        ("1/0", "1", 0),
        ("50%", "0.5", 1),
        ("50 %", "50", 1),
        (r"50\%", "0.5", 1),
        ("1e3", "1000", 1),
        (r"3 \times 10^{4}", "30000", 1),
        ("1.5 x 10^-2", "0.015", 1),
        ("12345678901234567890", "12345678901234567891", 0),  # equal as floats
        ("no number", "1", 0),
        ("1", "no number", 0),
        ("1", True, 0),
        ("", "1", 0),
        ("2", ["1", "2"], 1),
        ("72", "Natalia sold 48 / 2 = 24 in May.\n#### 72", 1),
        ("9" * 5000, "9", 0),
        ("1e999999999", "1", 0),
        ("٣", "3", 0),  # float() would read the Arabic digit
        (r"1{,}000", "1000", 1),
    ],
)
def test_last_number(reply, answer, right):
    assert score(Numeric(), group("7 is the first reply", reply, answer=answer)) == [{"numeric": float(right)}]


def test_tolerances():
    def right(reply, answer, **options):
        return score(Numeric(**options), group(reply, answer=answer))[0]["numeric"]

    assert right("3.14", "3.14159") == 0
    assert right("3.14", "3.14159", absolute=0.01) == 1  # off by .00159
    assert right("3.14", "3.14159", relative=0.001) == 1  # .001 * 3.14159 = .00314
    assert right("3.14", "3.14159", relative=0.0005) == 0  # .00157 < .00159
    assert right("-99", "-100", relative=0.01) == 1
    assert right("0.3333333", "1/3") == 1  # off by 3.3e-8
    assert right("0.1", "1/10", absolute=0) == 1  # exact: no binary fraction is between them
    assert right("50%", "50", percent="fraction") == 0


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (r"\boxed{1} or rather \boxed{\frac{1}{2}}, not 3", 1),
        (r"\boxed{x = 0.5}", 1),
        (r"0.5", 0),
        (r"\boxed{0.5", 0),
        (r"\boxed{}", 0),
    ],
)
def test_boxed(reply, right):
    assert score(Numeric(take="boxed"), group(reply, answer="0.5")) == [{"numeric": float(right)}]


def test_pattern():
    reward = Numeric(pattern=r"Answer:\s*(.+?)\n")
    assert score(reward, group("Answer: 5\nAnswer: 6 kg\nfrom 7", answer="6")) == [{"numeric": 1.0}]
    assert score(reward, group("6", answer="6")) == [{"numeric": 0.0}]
    with pytest.raises(ValidationError, match="not a regular expression"):
        Numeric(pattern="(")


def test_no_text_takes_long():
    # Backtracking would take minutes a text and more.
    finishes("""
from sapwood.rewards.numeric import Numeric
from tests.rewards.test_simple_rewards import group

for text in ("9" * 20000, "1," * 10000, "1 " * 10000, "-" * 20000, "1/" * 10000, "1" + " " * 20000, "1.1" * 7000):
    print(text[:10], flush=True)
    Numeric().score([group(text, answer="1")])
""")


def test_an_episode_without_a_turn():
    assert score(Numeric(), group(answer="1")) == [{"numeric": 0.0}]
