"""Secrets in text -> `[REDACTED kind]`: keys and tokens of known shape, private keys, what is assigned to a password.

    OPENAI_API_KEY=sk-proj-Ab3…   ->   OPENAI_API_KEY=[REDACTED OpenAI key]

The prefixes and lengths are those the providers publish, as collected in the rules of gitleaks (MIT). The code is our
own, because logs need more than a scanner of files gives: the whole of a private key also where it was cut off, and
keys that a terminal wrapped over two lines. A key of known prefix is redacted whatever follows it; where only the name
before a value gives it away ("token = …"), the value must look random, so that prose and code stay as they are.
"""
from __future__ import annotations

import base64
import math
import re
from collections import Counter

# kind, prefix, characters of the rest, least length of the rest, exact length of the rest where there is one.
# The exact length finds the end of a key that was wrapped over two lines. Longer prefixes come first.
SHAPES = [
    ("Anthropic key", r"sk-ant-[a-z]{2,8}\d\d-", r"[\w-]", 16, 0),
    ("OpenRouter key", r"sk-or-v1-", r"[0-9a-f]", 32, 64),
    ("OpenAI key", r"sk-(?:proj|svcacct|admin|None)-", r"[\w-]", 16, 0),
    ("API key", r"sk-(?:lf-|)", r"[A-Za-z0-9]", 20, 0),  # OpenAI's old form, and that of several others
    ("GitHub token", r"github_pat_", r"\w", 22, 82),
    ("GitHub token", r"gh[pousr]_", r"[A-Za-z0-9]", 20, 36),
    ("GitLab token", r"gl(?:pat|dt|ft|rt|ptt|cbt|agent|oas|soat|imt|ffct)-", r"[\w.-]", 20, 20),
    ("AWS access key", r"(?:AKIA|ASIA|ABIA|ACCA|A3T[A-Z0-9])", r"[A-Z0-9]", 16, 16),
    ("AWS Bedrock key", r"ABSK", r"[A-Za-z0-9+/=]", 100, 0),
    ("Google key", r"AIza", r"[\w-]", 35, 35),
    ("Google OAuth token", r"(?:ya29\.|GOCSPX-|1//0)", r"[\w-]", 20, 0),
    ("Slack token", r"xox(?:e\.xox)?(?:[abcdeprs]-|o-(?=\d))", r"[A-Za-z0-9%-]", 10, 0),
    ("Slack token", r"xapp-\d-", r"[A-Za-z0-9-]", 10, 0),
    ("Slack webhook", r"hooks\.slack\.com/(?:services|workflows|triggers)/", r"[A-Za-z0-9/+]", 20, 0),
    # the first part is a number of 17 to 19 digits in base 64
    ("Discord token", r"(?:[MNO][DTjz][AEIMQUYcgk][w-z0-5]){5,6}[\w-]{0,3}\.[\w-]{6}\.", r"[\w-]", 27, 0),
    ("Discord webhook", r"discord(?:app)?\.com/api/webhooks/", r"[\w/-]", 40, 0),
    ("Hugging Face token", r"(?:hf_|api_org_)", r"[A-Za-z0-9]", 30, 34),
    ("Stripe key", r"[sr]k_(?:live|test|prod)_", r"[A-Za-z0-9]", 10, 0),
    ("ElevenLabs key", r"sk_", r"[0-9a-f]", 48, 48),
    ("Stripe webhook secret", r"whsec_", r"[A-Za-z0-9+/=]", 24, 0),
    ("Groq key", r"gsk_", r"[A-Za-z0-9]", 40, 52),
    ("Together key", r"tgp_v1_", r"[\w-]", 43, 43),
    ("xAI key", r"xai-", r"[A-Za-z0-9]", 40, 80),
    ("Perplexity key", r"pplx-", r"[A-Za-z0-9]", 40, 48),
    ("Replicate token", r"r8_", r"[A-Za-z0-9]", 37, 37),
    ("LangSmith key", r"lsv2_(?:pt|sk)_", r"[0-9a-f_]", 32, 43),
    ("npm token", r"npm_", r"[A-Za-z0-9]", 36, 36),
    ("PyPI token", r"pypi-AgE", r"[\w-]", 50, 0),
    ("SendGrid key", r"SG\.", r"[\w.-]", 66, 66),
    ("DigitalOcean token", r"do[opr]_v1_", r"[0-9a-f]", 64, 64),
    ("Databricks token", r"dapi", r"[0-9a-f]", 32, 32),
    ("Notion token", r"ntn_", r"[A-Za-z0-9]", 40, 46),
    ("Airtable token", r"pat[A-Za-z0-9]{14}\.", r"[0-9a-f]", 64, 64),
    ("Linear key", r"lin_api_", r"[A-Za-z0-9]", 40, 40),
    ("Docker token", r"dckr_(?:pat|oat)_", r"[\w-]", 24, 0),
    ("Vault token", r"hv[sbr]\.", r"[\w-]", 24, 0),
    ("age key", r"AGE-SECRET-KEY-1", r"[A-Z0-9]", 58, 58),
    ("Telegram bot token", r"(?:bot)?\d{8,10}:AA", r"[\w-]", 33, 33),
    ("Twilio key", r"SK", r"[0-9a-f]", 32, 32),
    ("Mailgun key", r"key-", r"[0-9a-f]", 32, 32),
    ("NVIDIA key", r"nvapi-", r"[\w-]", 40, 64),
    ("Tavily key", r"tvly-(?:dev-)?", r"[A-Za-z0-9]", 24, 0),
    ("Pinecone key", r"pcsk_", r"\w", 40, 0),
    ("Atlassian token", r"ATATT3", r"[\w=-]", 100, 0),
    ("Shopify token", r"shp(?:at|ca|pa|ss)_", r"[0-9a-fA-F]", 32, 32),
    ("Figma token", r"figd_", r"[\w-]", 40, 40),
    ("Supabase token", r"sbp_", r"[0-9a-f]", 40, 40),
    ("Sentry token", r"sntry[su]_", r"[\w=+/]", 60, 0),
    ("New Relic key", r"NRAK-", r"[A-Z0-9]", 27, 27),
    ("Heroku token", r"HRKU-AA", r"[\w-]", 58, 58),
    ("Postman key", r"PMAK-", r"[0-9a-f-]", 59, 59),
    ("Grafana token", r"glsa_", r"\w", 41, 41),
    ("RubyGems key", r"rubygems_", r"[0-9a-f]", 48, 48),
    ("PlanetScale token", r"pscale_(?:tkn|oauth|pw)_", r"[\w.=-]", 32, 0),
]
_CHARACTERS = {f"k{i}": re.compile(shape[2] + "*") for i, shape in enumerate(SHAPES)}
# nothing like a word before the prefix, unless it is an escape in quoted text: \nghp_…, %20ghp_…
_NOT_IN_WORD = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt])|(?<=%[0-9A-F]{2}))"
_PREFIX = re.compile(_NOT_IN_WORD + "(?:" + "|".join(f"(?P<k{i}>{s[1]})" for i, s in enumerate(SHAPES)) + ")")
_BREAK = re.compile(r"\r?\n[ \t]*")  # a line end inside a key

_NAME = r"(?:\s+[A-Z0-9]+){0,4}?\s+PRIVATE\s+KEY(?:\s+BLOCK)?-----"
_BEGIN, _END = re.compile("-----BEGIN" + _NAME), re.compile("-----END" + _NAME)
_GAP = r"""(?:[\s>|"',-]|\\[nr])*"""  # between lines of a key: quoting, diff marks, escaped line ends
_LINE = (r"(?:(?:Proc-Type|DEK-Info|Version|Comment|Hash|Charset):[^\n]*+|[A-Za-z0-9+/]{16,}+={0,2}+|"
         r"[A-Za-z0-9+/]{1,15}+={1,2}+)")  # groups are never possessive: before Python 3.11.5 they match wrongly
_CUT_BODY = re.compile(f"(?:{_GAP}{_LINE})+(?:{_GAP}(?=[a-z]*[A-Z0-9+/])[A-Za-z0-9+/]{{1,15}}(?=\\s*\\Z))?")
_TAIL_LINE = re.compile(r"[\s>|\"',-]*[A-Za-z0-9+/=]{16,}[\s\"',]*")
_KEY_LIMIT = 64 << 10  # characters; no private key is longer

_JWT = re.compile(_NOT_IN_WORD + r"eyJ[\w\r\n-]{10,4000}\.[\r\n]{0,2}eyJ[\w\r\n-]{10,8000}\.[\r\n]{0,2}[\w-]{10,}")
_ASSIGN = r"""["'`]?\]?[ \t]{0,2}(?::=|=>|==?|:)[ \t]{0,2}\\?["'`]?"""
_CONTEXT = [  # kind, pattern whose group is the secret, what it has to look like besides
    ("Azure DevOps token", re.compile(_NOT_IN_WORD + r"([A-Za-z0-9]{76}AZDO[A-Za-z0-9]{4})(?![A-Za-z0-9])"),
     lambda v: True),
    ("Azure AI key", re.compile(_NOT_IN_WORD + r"([A-Za-z0-9]{52}JQQJ9[A-Za-z0-9]{27})(?![A-Za-z0-9])"),
     lambda v: True),
    ("Azure client secret", re.compile(_NOT_IN_WORD + r"([\w~.-]{3}\dQ~[\w~.-]{31,34})(?![\w~-])"),
     lambda v: True),
    ("private key", re.compile(r"Private-Lines: \d+(?:\\[rn]|\s)+((?:[A-Za-z0-9+/]{20,}+={0,2}+(?:\r?\n|\\n)?)+)"),
     lambda v: True),  # PuTTY's form
    ("signature in a URL", re.compile(r"[?&](?:sig|[Ss]ignature)=([\w%+/=-]{40,512})"), lambda v: _random(v)),
    ("bearer token", re.compile(r"(?i)\bbearer\s+([\w+/=.~-]{16,512})"), lambda v: _random(v)),
    ("basic authentication", re.compile(r"""(?i)\bauthorization["']?\s{0,2}[:=]\s{0,2}["']?basic\s+"""
                                        r"([A-Za-z0-9+/]{8,512}={0,2})"), lambda v: True),
    ("basic authentication", re.compile(r"""\\?"auth\\?"\s{0,2}:\s{0,2}\\?"([A-Za-z0-9+/]{8,512}={0,2})\\?\""""),
     lambda v: _is_pair(v)),  # Docker's config.json
    ("password in a URL", re.compile(r"""\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@"'`<>]{0,64}:([^\s/@"'`<>{}$\[\]]{3,128})@"""),
     lambda v: not _placeholder(v)),
    ("password", re.compile(r"(?i)(?:passw(?:or)?[dt]|passphrase|kennwort|pwd|DB_PASS)" + _ASSIGN +
                            r"""([^\s"'`,;()<>{}\[\]$\\]{8,128})"""), lambda v: _strong(v)),
    ("password", re.compile(r"""(?i)\s--?(?:password|passwd)[ =]["'`]?([^\s"'`,;()<>{}\[\]$\\]{8,128})"""),
     lambda v: _strong(v)),
    ("password", re.compile(r"""\bcurl\b[^\n]{0,300}?\s(?:-u|--user)[ =]?["']?[^\s:"'$]{1,64}:"""
                            r"""([^\s"'`$<>{}]{3,128})"""), lambda v: not _placeholder(v)),
    ("password", re.compile(r"\blogin\s+\S{1,64}\s+password\s+([^\s\"'`,;]{8,128})"),
     lambda v: _strong(v) or _random(v)),  # .netrc
    ("secret", re.compile(r"""(?i)\s--?(?:[a-z]{1,12}-)?(?:token|secret|api-?key)[ =]["'`]?([\w+/=.~-]{16,512})"""),
     lambda v: _random(v)),
    ("secret", re.compile(r"(?i)(?:(?:api|access|account|private)[_-]?key|secret(?:[_-]?key)?|token|credential|_pat)s?"
                          r"(?![A-Za-z])" + _ASSIGN + r"([\w+/=.~-]{16,512})"), lambda v: _random(v)),
]
_PLACEHOLDERS = re.compile(r"(?i)example|your|placeholder|change|dummy|sample|insert|redacted|secret|passw|token|x{4}|"
                           r"\*{3}|\.\.\.|(?:abc|123)+$|^(?:user|pass|pwd|root|admin|postgres|guest|test)$")


def redact(text: str) -> tuple[str, list[str]]:
    """Return the text without its secrets, and the kinds of what was found, one entry for each place."""
    found: list[str] = []
    text = _replace(text, [(start, end, "private key") for start, end in _private_keys(text)], found)
    text = _replace(text, _shaped(text), found)
    text = _replace(text, [(m.start(), _extend(text, m.end(), _CHARACTERS["k0"]), "JSON web token")
                           for m in _JWT.finditer(text)], found)
    for kind, pattern, looks_right in _CONTEXT:
        text = _replace(text, [(*m.span(1), kind) for m in pattern.finditer(text) if looks_right(m[1])], found)
    return text, found


def redact_all(value: object, found: list[str]) -> object:
    """The same for every text inside lists and objects, as in tool calls; the kinds are added to `found`."""
    if isinstance(value, str):
        text, kinds = redact(value)
        found += kinds
        return text
    if isinstance(value, list):
        return [redact_all(item, found) for item in value]
    if isinstance(value, dict):
        return {redact_all(key, found): redact_all(item, found) for key, item in value.items()}
    return value


def _replace(text: str, spans: list[tuple[int, int, str]], found: list[str]) -> str:
    parts, at = [], 0
    for start, end, kind in spans:
        if start >= at:
            parts += [text[at:start], f"[REDACTED {kind}]"]
            at = end
            found.append(kind)
    return "".join([*parts, text[at:]]) if parts else text


def _shaped(text: str) -> list[tuple[int, int, str]]:
    """Keys that their prefix gives away, with what a line end cut off from them."""
    spans = []
    for match in _PREFIX.finditer(text):
        kind, _, _, least, exact = SHAPES[int(match.lastgroup[1:])]
        characters = _CHARACTERS[match.lastgroup]
        end = characters.match(text, match.end()).end()
        size = end - match.end()
        if size < (exact or least) or not exact:
            line_end = _BREAK.match(text, end)
            rest = characters.match(text, line_end.end()).end() - line_end.end() if line_end else 0
            if exact and rest and size < exact <= size + rest:
                end, size = line_end.end() + exact - size, exact
            elif not exact:
                extended = _extend(text, end, characters)
                size, end = size + extended - end, extended
        if size >= least:
            spans.append((match.start(), end, kind))
    return spans


def _extend(text: str, end: int, characters: re.Pattern) -> int:
    """The end of a key of unknown length that goes on at the beginning of the next lines."""
    while line_end := _BREAK.match(text, end):
        rest = characters.match(text, line_end.end())
        run = rest[0]
        mixed = any(c.isdigit() for c in run) and any(c.isupper() for c in run) and any(c.islower() for c in run)
        if len(run) < 8 or not mixed:
            return end
        end = rest.end()
    return end


def _private_keys(text: str) -> list[tuple[int, int]]:
    """Spans of private keys in PEM form: whole ones, ones that begin but do not end, and ends without a beginning."""
    if "PRIVATE" not in text:
        return []
    spans, at = [], 0
    for begin in _BEGIN.finditer(text):
        if begin.start() < at:
            continue
        following = _BEGIN.search(text, begin.end())
        limit = min(following.start() if following else len(text), begin.end() + _KEY_LIMIT)
        end = _END.search(text, begin.end(), limit)
        if end and re.search(r"[A-Za-z0-9+/=]{16}", text[begin.end():end.start()]):
            spans.append((begin.start(), end.end()))
        elif not end and (body := _CUT_BODY.match(text, begin.end(), limit)):
            spans.append((begin.start(), body.end()))
        else:
            continue  # a header alone, as in code that looks for one
        at = spans[-1][1]
    for end in _END.finditer(text):
        if not any(start <= end.start() < stop for start, stop in spans):
            first = _first_line_of_tail(text, end.start())
            if first < end.start():
                spans.append((first, end.end()))
    return sorted(spans)


def _first_line_of_tail(text: str, end: int) -> int:
    """Where the lines of a key begin that end at `end`; `end` if there are none."""
    first, last = end, True
    while first > 0:
        escaped = text.rfind("\\n", 0, first - 2)
        cut = max(text.rfind("\n", 0, first - 1) + 1, escaped + 2 if escaped >= 0 else 0)
        line = text[cut:first].removesuffix("\\n")
        short = last and re.fullmatch(r"[\s>|\"',-]*[A-Za-z0-9+/=]{1,15}[\s\"',]*", line)
        if not (_TAIL_LINE.fullmatch(line) or short or (last and not line.strip(" \t\n>|\"'"))):
            break
        first, last = cut, False
    begun = re.search(r"[A-Za-z0-9+/]{16,}[\s\"',\\n]*\Z", text[max(0, first - 200):first])
    return first - len(begun[0]) if begun and first < end else first


def _placeholder(value: str) -> bool:
    return _PLACEHOLDERS.search(value) is not None or len(set(value)) < 4


def _is_pair(value: str) -> bool:
    """Whether it is "name:password" in base 64."""
    try:
        return re.fullmatch(r"[!-~]+:[!-~]+", base64.b64decode(value, validate=True).decode()) is not None
    except ValueError:
        return False


def _strong(value: str) -> bool:
    """Like a password somebody chose well: letters and digits, and upper and lower case or another sign."""
    letters, digits = sum(c.isalpha() for c in value), sum(c.isdigit() for c in value)
    varied = value.lower() != value != value.upper() or letters + digits < len(value)
    code = re.search(r"^[a-z_]\w*\.\w|^[./]|\.\w{1,4}$|://", value)  # settings.db_1, a file, an address
    return letters > 1 and digits > 0 and varied and not code and not _placeholder(value)


def _random(value: str) -> bool:
    """Like a generated key: letters and several digits, over 3.5 bits a character, no path, name or placeholder."""
    digits = sum(c.isdigit() for c in value)
    if digits < 2 or not any(c.isalpha() for c in value) or _placeholder(value):
        return False
    if len(value) >= 40 and re.fullmatch(r"[A-Za-z0-9+/]+={1,2}|[A-Za-z0-9+/]{40}", value):
        value = value.lstrip("/")  # base 64, no path
    if re.search(r"^[./]|\.[a-z]{1,6}$|^[a-z_]+\.[a-z_]+|^[a-z]+([_-][a-z]+)*[_-]?\d+$", value):
        return False
    bits = -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())
    return bits > (3.0 if re.fullmatch(r"[0-9a-f-]+", value) else 3.5)
