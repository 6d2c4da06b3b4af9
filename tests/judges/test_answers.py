"""The written rule for a language model's answer (judges/answers.py): a table of what they say and what it is worth."""

import time

import pytest

from inpo_fast.judges.answers import score_in

CLEAR = [  # from 0 to 10
    ("7", 7),
    ("7.5/10", 7.5),
    ("8 out of 10", 8),
    ("Score: 7", 7),
    ("**7**", 7),
    ("10/10", 10),
    ("0/10", 0),
    ("10", 10),
    ("0", 0),
    ('{"score": 7}', 7),
    ('{"score": 7, "reason": "3 cats"}', 7),
    ('```json\n{"score": "7/10"}\n```', 7),
    ("<think>maybe 3 or 4</think>\n7", 7),
    ("reasoning 3 </think> 7/10", 7),
    ("7/10. In all 7 / 10", 7),
    ("**7**/10", 7),
    ("In 2024 a 7", 7),
    ("\uff17/\uff11\uff10", 7),
    ("\u0667", 7),
    ("7 out of ten", 7),
    (".5", 0.5),
    ("7.", 7),
    ("7...", 7),
    ("Hmm...7", 7),
    ("<score>7</score>", 7),
    ("\\boxed{7}", 7),
    ("1e1", 10),
    ("Score: 3.3333 of 10", 3.3333),
    ("3 of 10 prompts are shown, 6/10", 6),
    ("+7", 7),
    ("\u5f97\u52067\u5206", 7),
    ("7\ufe0f\u20e3", 7),
    ("8 - Two cats are shown", 8),
    ("Score \u2014 7", 7),
    ("7 \u2014 well done", 7),
    ("[7]", 7),
    ("Overall: 8 / 10 (80%)", 8),
    ("7 stars", 7),
    ("7 points", 7),
    ("7 because it is sharp", 7),
    ("Score: 7. The picture is sharp.", 7),
    ("I'd give it a solid 7.", 7),
    ("I would assign a score of 7 to this image.", 7),
    ("This picture gets a 7/10!", 7),
    ("8 out of 10 for content", 8),
    ("It's a 7.", 7),
    ("7\nThe picture is sharp.", 7),
    ("A sharp picture.\n7", 7),
    ("A sharp picture. 7.", 7),
    ("# Score\n7", 7),
    ("| score | 7 |", 7),
    ("<answer>8</answer>", 8),
    ("\u8bc4\u5206\uff1a7", 7),
    ("The picture does not show a cat. Score: 3", 3),
    ("It doesn't match the prompt, so I rate it 2.", 2),
]
UNCLEAR = [
    "between 6 and 7",
    "7-8",
    "7\u20138",
    "7 - 8",
    "7 to 8",
    "-3",
    "\u22123",
    "11/10",
    "7/5",
    "70%",
    "7%",
    "seven",
    "seven out of 10",
    "seven/10",
    "1/2",
    "1,000",
    "7,5",
    "7,5/10",
    '{"score": 11}',
    '{"score": true}',
    '{"score": NaN}',
    "<think>maybe 3",
    "I'm sorry, I can't rate pictures.",
    "I cannot give a score out of 10.",
    "",
    "On a scale from 0 to 10 I give this a 7.",
    "7/10 for content, 8/10 for looks",
    "7-8/10",
    "6 or 7 out of 10",
    "six or 7",
    "7th",
    "3D render: 7",
    "SD1.5",
    "10-point scale: seven",
    "7\xbd",
    "7 and a half",
    "7 out of 100",
    "7/100",
    "1. cats\n2. dogs\n7",
    "nan",
    "inf",
    "1e999",
    "7+",
    "> 7",
    "7/10/2024",
    "10 - 3 = 7",
    "-3 points from 10",
    "24/7 good: 8",
    "7.5.1",
    "7:30",
    "score 7 of 9 objects",
    "3 of 100 objects",
    "0x7",
    "7out of10",
    "null",
    # numbers of something else
    "I cannot rate this image; 0 faces are visible.",
    "Step 1: look.",
    "1. The image is good.",
    "1) good",
    "* 1. good",
    "[1] source",
    "I counted 2 hands. Score: seven",
    "image #2",
    "No. 7",
    "Fig. 1",
    "Picture 1 is better",
    "The caption says '5 apples'.",
    "2 cats.",
    "There are 2 cats.",
    "The dress has a 7.",
    "Number of cats: 2",
    "Score: 5 apples",
    "Score 1: composition good",
    "The answer shows 3 cats",
    "I give it 2 thumbs",
    '{"cats": 2}',
    "10 out of 10 people would like it",
    "10/10 people like it",
    # not said to be it
    "definitely not a 10/10",
    "I would not give it a 7.",
    "It is not a 7, it is bad",
    "Score: not 7",
    "If there were a cat, I'd give it an 8.",
    "Is it a 7?",
    "Score: 7/10?",
    "at least 7",
    "at least 7/10",
    "less than 3",
    "I'd rate this less than a 3",
    "more than 8 out of 10",
    "Score: below 5",
    "almost a 7",
    "7 or more",
    "7/10 or more",
    "7 at best",
    "far from a 10/10",
    "I can't rate this. 5",
    "I cannot give it a score.\n0",
    "The highest score is 10.",
]
OTHER_SCALES = [
    ("70%", 0, 100, 70.0),
    ("70", 0, 100, 70.0),
    ("1,000/1,000", 0, 1000, 1000.0),
    ("750", 0, 1000, 750.0),
    ("-3", -5, 5, -3.0),
    ("-3 or -4", -5, 5, None),
    ("4/5", 1, 5, 4.0),
    ("4 out of 5 stars", 1, 5, 4.0),
    ("0/5", 1, 5, None),
    ("4/10", 1, 5, None),  # a share of another scale
    ("0.7", 0, 1, 0.7),
    ("0.7/1.0", 0, 1, 0.7),
]


@pytest.mark.parametrize(("answer", "score"), CLEAR)
def test_clear(answer, score):
    assert score_in(answer, 0, 10) == score


@pytest.mark.parametrize("answer", UNCLEAR)
def test_unclear(answer):
    assert score_in(answer, 0, 10) is None


@pytest.mark.parametrize(("answer", "low", "high", "score"), OTHER_SCALES)
def test_other_scales(answer, low, high, score):
    assert score_in(answer, low, high) == score


@pytest.mark.parametrize(
    "answer",
    [
        "[" * 100_000,
        "9" * 100_000,
        " " * 4_000_000,
        "1 " * 9_000,
        "<think>" * 50_000,
        '{"score":' * 9_000,
        "\n" * 9_000 + "x 1" + "\n" * 9_000 + "x",
        "score: " * 2_000 + "x 1",
        "10/10 x " * 2_000,
        "not " * 4_000 + "7/10",
    ],
)
def test_what_is_no_answer_takes_no_time(answer):
    begun = time.process_time()
    assert score_in(answer, 0, 10) is None
    assert time.process_time() - begun < 2


def test_the_whole_scale_in_every_usual_wording():
    """Every N of the scale, whole and half, comes back as it was said."""
    wordings = (
        "{}",
        "{}/10",
        "{} / 10",
        "{} out of 10",
        "Score: {}",
        "**{}**",
        "I give it a {}.",
        "<think>5 or 6</think>{}",
    )
    for wording in wordings:
        for twice in range(21):
            said = f"{twice / 2:g}"
            assert score_in(wording.format(said), 0, 10) == twice / 2, wording.format(said)
