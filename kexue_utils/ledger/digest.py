"""What counts as "the same" LaTeX and the same Python source, as short digests that every Python version agrees on."""

import hashlib
import io
import re
import tokenize


def digest(text):
    """The first 16 hexadecimal digits of the SHA-256 of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(latex):
    """Digest of an equation's LaTeX, blind to nothing but how long its runs of whitespace are."""
    return digest(" ".join(latex.split()))


def code_digest(text):
    """Digest of Python source, blind to comments, blank lines and spaces within a line, not to indentation.

    Only the positions of comments are taken from `tokenize`, as Python 3.12 cuts f-strings into other tokens than 3.11.
    Text that is no Python is digested whole.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    try:
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
    except (tokenize.TokenError, SyntaxError):
        return digest(text)
    return digest("\n".join(re.sub(r"(?<=\S)\s+", " ", line.rstrip()) for line in lines if line.strip()))
