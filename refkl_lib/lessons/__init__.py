"""Predictions before a measurement, and exercises that recognise a mistake.

    predict("05.logits-mib", 500)              a number, typed before the measurement
    reveal("05.logits-mib", 982, unit="MiB")   the measurement, beside it

    check("05.k3", k3)                         what is right or wrong with the function `k3`
    hint("05.k3")                              a step towards it; another one each time
    solution("05.k3")                          the code, and why it is that way
    progress()                                 all of it, as one picture

Each of them returns an object that shows itself as the last line of a cell; a script prints it. `exercise.py`
says what an exercise is made of, `kl.py` holds those of notebook 05.
"""
