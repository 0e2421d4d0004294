"""Links from the sentences of the report to the definitions of their terms."""

import re

from opdctl.analysis.glossary import GLOSSARY, link_terms


def test_terms_are_linked_where_they_occur_first():
    text = str(link_terms("The signal and the reverse KL; the signal again. Prefix ratios, a prefix."))
    assert re.findall(r'href="#term-(\w+)">(.*?)<', text) == [
        ("signal", "signal"),
        ("kl", "reverse KL"),
        ("ratio", "Prefix ratios"),
        ("prefix", "prefix"),
    ]


def test_names_of_weights_are_no_terms():
    assert link_terms("prefix_ratio alpha=1, prefix_only") == "prefix_ratio alpha=1, prefix_only"


def test_text_is_escaped():
    assert link_terms("<b>|A|</b>") == '&lt;b&gt;<a class="term" href="#term-signal">|A|</a>&lt;/b&gt;'


def test_each_term_has_one_definition():
    assert len({term.id for term in GLOSSARY}) == len(GLOSSARY)
