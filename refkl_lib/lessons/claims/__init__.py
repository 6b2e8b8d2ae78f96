"""The claims of one article, like dozens of posts on this subject, each with a test that can come out either way.

`claim.py` says what a claim is made of, `article.py` lists them; the other files hold them by the article's sections:
`cloning.py` (A), `switching.py` (B), `sharding.py` (C), `diverging.py` (D), `choosing.py` (E). `trials.py` has what
they try things on. A new claim is one more `Claim` in a section's tuple.
"""
