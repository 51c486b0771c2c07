"""The trainable parts that are grafted onto a frozen base.

Three terms are used:

    adapter         a method as a run configures it: conf/adapter/NAME.yaml, one object per run
    Delta           the adapter's correction of one linear layer
    AdaptedLinear   that layer with its Delta
"""
