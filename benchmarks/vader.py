"""A reward that no code of ours judges: how positive a text is, by VADER (Hutto and Gilbert 2014), whose scores of
words are means of ten human raters.

    pip install vaderSentiment
    python ppo_rlhf_token.py --reward-fn benchmarks/vader.py:score ...
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ANALYZER = SentimentIntensityAnalyzer()


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """The compound scores of responses, from -1, most negative, to 1, most positive."""
    return [ANALYZER.polarity_scores(response)["compound"] for response in responses]
