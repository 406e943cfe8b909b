"""The pages' formulas, TeX between dollars, as MathML: browsers draw it without scripts or fonts from elsewhere."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

BESIDE = r"\qquad"
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)  # as arithmatex leaves it
_BAR = re.compile(r"<mo>(&#x02016;|&#x0007C;)</mo>")  # bars grow with \left and \right alone, as other fences do
_SIGN = re.compile(r"(<mo[^>]*>(?:&#x00028;|&#x0003D;)</mo>)<mo>&#x02212;</mo>")  # a sign, not a difference


def with_mathml(page: str, name: str) -> str:
    """A page's HTML with its formulas as MathML, those on lines of their own inside ``<div class="formula">``.

    Formulas with ``\\qquad`` between them are put beside each other where the page is wide enough.

    Raises:
        ValueError: naming the page and the formula that cannot be read, or holds a command nobody knows.
    """

    def written(found: re.Match) -> str:
        tex = html.unescape(found[2])
        if found[1] == "span":
            return _math(tex, "inline", name)
        return f'<div class="formula">{"".join(_math(part, "block", name) for part in tex.split(BESIDE))}</div>'

    return _FORMULA.sub(written, page)


def _math(tex: str, display: str, name: str) -> str:
    try:
        made = convert(tex.strip(), display=display)
    except Exception as error:
        raise ValueError(f"{name}: {tex!r} is no formula that latex2mathml can read ({error!r})") from error
    if unknown := re.findall(r"\\\w+", re.sub(r"<[^>]+>", " ", made)):
        raise ValueError(f"{name}: latex2mathml does not know {', '.join(unknown)} in {tex!r}")
    made = made.replace("<mo>&#x0002F;</mo>", '<mo lspace="0" rspace="0">&#x0002F;</mo>')  # TeX sets a / without spaces
    made = _SIGN.sub(r'\1<mo form="prefix">&#x02212;</mo>', made)
    return _BAR.sub(r'<mo stretchy="false">\1</mo>', made)
