"""What is grafted onto a frozen base.

Three words, and no fourth: the *adapter* is the method as a run configures it
(conf/adapter/NAME.yaml, one object a run); a *Delta* is its correction of one linear layer; an
*AdaptedLinear* is that layer with its Delta.
"""
