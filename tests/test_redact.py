"""Secrets go, whole, wherever they are; prose and code stay."""
import base64
import hashlib
import random
import string

import pytest

from common.redact import redact

# Made up here, character by character, so that no scanner of this repository finds a key in it.
LETTERS = "".join(random.Random(7).choices(string.ascii_letters + string.digits, k=400))
HEX = hashlib.sha256(b"").hexdigest()
BASE64 = "\n".join(LETTERS[i:i + 64] for i in range(0, 320, 64)) + "\nq0=="
OPENAI, GITHUB = "sk-" + "proj-" + LETTERS[:120], "gh" + "p_" + LETTERS[:36]
PRIVATE = "-----BEGIN OPENSSH " + "PRIVATE KEY-----\n" + BASE64 + "\n-----END OPENSSH " + "PRIVATE KEY-----"
HEADER, FOOTER = PRIVATE.splitlines()[0], PRIVATE.splitlines()[-1]


@pytest.mark.parametrize(
    "kind, secret",
    [
        ("Anthropic key", "sk-" + "ant-api03-" + LETTERS[:95]),
        ("AWS access key", "AK" + "IAIOSFODNN7EXAMPLE"),
        ("API key", "sk" + "-" + LETTERS[:48]),
        ("Google key", "AI" + "za" + LETTERS[:35]),
        ("GitHub token", "github" + "_pat_" + LETTERS[:22] + "_" + LETTERS[:59]),
        ("GitHub token", "gh" + "o_" + LETTERS[:36]),
        ("GitLab token", "gl" + "pat-" + LETTERS[:20]),
        ("Slack token", "xo" + "xb-123456789012-" + LETTERS[:24]),
        ("Hugging Face token", "h" + "f_" + LETTERS[:34]),
        ("Stripe key", "sk" + "_live_" + LETTERS[:24]),
        ("JSON web token", "ey" + "JhbGciOiJIUzI1NiJ9.ey" + "JzdWIiOiIxMjM0In0." + LETTERS[:43]),
        ("Telegram bot token", "123456789" + ":AA" + LETTERS[:33]),
        ("Twilio key", "S" + "K" + HEX[:32]),
        ("Mailgun key", "key" + "-" + HEX[:32]),
        ("NVIDIA key", "nv" + "api-" + LETTERS[:64]),
        ("Tavily key", "tv" + "ly-dev-" + LETTERS[:32]),
        ("Pinecone key", "pc" + "sk_" + LETTERS[:6] + "_" + LETTERS[6:66]),
        ("Atlassian token", "AT" + "ATT3xFfGF0" + LETTERS[:170] + "=1A2B3C4D"),
        ("Shopify token", "sh" + "pat_" + HEX[:32]),
        ("Figma token", "fi" + "gd_" + LETTERS[:40]),
        ("Supabase token", "sb" + "p_" + HEX[:40]),
        ("Sentry token", "sn" + "trys_" + LETTERS[:90]),
        ("New Relic key", "NR" + "AK-" + LETTERS.upper()[:27]),
        ("Heroku token", "HR" + "KU-AA" + LETTERS[:58]),
        ("Postman key", "PM" + "AK-" + HEX[:24] + "-" + HEX[:34]),
        ("Grafana token", "gl" + "sa_" + LETTERS[:32] + "_" + HEX[:8]),
        ("RubyGems key", "ruby" + "gems_" + HEX[:48]),
        ("PlanetScale token", "ps" + "cale_tkn_" + LETTERS[:43]),
        ("Discord token", base64.b64encode(b"112233445566778899").decode() + ".GaBcDe." + LETTERS[:38]),
        ("Discord token", base64.b64encode(b"1122334455667788990").decode().rstrip("=") + ".GaBcDe." + LETTERS[:27]),
        ("Azure DevOps token", LETTERS[:76] + "AZ" + "DO" + LETTERS[80:84]),
        ("Azure AI key", LETTERS[:52] + "JQ" + "QJ99" + LETTERS[8:34]),
        ("Azure client secret", LETTERS[:3] + "8Q" + "~" + LETTERS[4:38]),
        ("Google OAuth token", "GOC" + "SPX-" + LETTERS[:28]),
        ("Slack token", "xo" + "xe.xo" + "xp-1-" + LETTERS[:140]),
        ("Slack token", "xo" + "xc-123456789012-" + LETTERS[:24]),
        ("Slack token", "xo" + "xd-" + LETTERS[:40] + "%2B" + LETTERS[40:80]),
        ("npm token", "np" + "m_" + LETTERS[:36]),
        ("PyPI token", "py" + "pi-AgEIcHlwaS5vcmc" + LETTERS[:150]),
        ("SendGrid key", "S" + "G." + LETTERS[:22] + "." + LETTERS[22:65]),
        ("age key", "AGE-SECRET-" + "KEY-1" + LETTERS.upper()[:58]),
        ("Airtable token", "pa" + "t" + LETTERS[:14] + "." + HEX),
        ("ElevenLabs key", "s" + "k_" + HEX[:48]),
        ("Together key", "tg" + "p_v1_" + LETTERS[:43]),
        ("private key", PRIVATE),
        ("private key", PRIVATE.replace("OPENSSH", "EC")),
        ("private key", PRIVATE.replace("OPENSSH", "PGP").replace("KEY-----", "KEY BLOCK-----")),
        ("private key", PRIVATE.replace("\n", "\\\\n")),
        ("private key", PRIVATE.replace("OPENSSH ", "")),
        ("private key", PRIVATE.replace("\n", "\\n")),
        ("private key", PRIVATE.replace("\n", "\r\n")),
        ("private key", PRIVATE.replace("\n", "\n> ")),
        ("private key", HEADER + "\n" + BASE64),
        ("private key", BASE64 + "\n" + FOOTER),
        ("private key", PRIVATE.replace("SSH PRIVATE", "SSH\nPRIVATE")),
    ],
)
def test_kinds_of_secrets(kind, secret):
    """The published shapes, whole, quoted, escaped or cut off; nothing around them is touched; twice is as once."""
    for before, after in (
        ("It is ", ", ok."),
        ('export X="', '"\nls'),
        ("", ""),
        ("(`", "`)"),
        ("A line\n", "\nmore prose."),
    ):
        text, kinds = redact(before + secret + after)
        assert (text, kinds) == (f"{before}[REDACTED {kind}]{after}", [kind])
        assert redact(text) == (text, [])
    if kind != "private key":
        assert redact(f"\\n{secret}") == (f"\\n[REDACTED {kind}]", [kind])  # escaped text
    doubled = f"{secret} and\n{secret}"
    assert redact(doubled)[1] == [kind, kind]


@pytest.mark.parametrize(
    "kind, secret",
    [
        ("GitHub token", GITHUB),
        ("AWS access key", "AK" + "IAIOSFODNN7EXAMPLE"),
        ("OpenAI key", OPENAI),
        ("Google key", "AI" + "za" + LETTERS[:35]),
        ("Anthropic key", "sk-" + "ant-api03-" + LETTERS[:95]),
    ],
)
def test_a_key_wrapped_over_two_lines(kind, secret):
    """Terminals and logs wrap at 80 columns; guards against half a key that stays."""
    for at in range(max(len(secret) - 20, 5), len(secret) - 8):
        text, kinds = redact(f"key: {secret[:at]}\n{secret[at:]}\nand then it printed more")
        assert (text, kinds) == (f"key: [REDACTED {kind}]\nand then it printed more", [kind]), at


@pytest.mark.parametrize(
    "text, kinds",
    [
        ("password = 'Tr0ub4dor&3'", ["password"]),
        ('{"DB_PASSWORD": "q9!fK2mz"}', ["password"]),
        ("postgres://app:Xk29_fq@db.local/app", ["password in a URL"]),
        (f"Authorization: Bearer {LETTERS[:32]}", ["bearer token"]),
        ("authorization: Basic dXNlcjpodW50ZXIy", ["basic authentication"]),
        (f"MY_API_KEY={LETTERS[:24]}", ["secret"]),
        (f'client_secret: "{LETTERS[:30]}"', ["secret"]),
        ("tool --user me --password Tr0ub4dor&3 run", ["password"]),
        (f"tool --auth-token {LETTERS[:30]} run", ["secret"]),
        (f"AccountName=me;AccountKey={LETTERS[:86]}==;EndpointSuffix=x", ["secret"]),
        (f"SharedAccessKeyName=Root;SharedAccessKey=/{LETTERS[:21]}/{LETTERS[21:41]}=", ["secret"]),
        (f"https://me.blob.core.windows.net/c?sv=2022&sig={LETTERS[:43]}%3D&se=2030", ["signature in a URL"]),
        (f"aws_secret_access_key = /{LETTERS[:20]}+{LETTERS[20:38]}", ["secret"]),
        (f"AZURE_DEVOPS_EXT_PAT={LETTERS.lower()[:52]}", ["secret"]),
        (f"Private-Lines: 2\n{LETTERS[:64]}\n{LETTERS[64:100]}==\nPrivate-MAC: 00", ["private key"]),
        (f"curl -sS -u admin:{LETTERS[:14]} https://h", ["password"]),
        (f"machine h\n  login me\n  password {HEX[:40]}", ["password"]),
        ('{"h": {"auth": "' + base64.b64encode(b"me:hunter2hunter").decode() + '"}}', ["basic authentication"]),
    ],
)
def test_what_is_assigned_to_a_name_of_a_secret(text, kinds):
    """Values without a known shape, where they look like generated ones."""
    out, found = redact(text)
    assert found == kinds and redact(out) == (out, []) and out != text


@pytest.mark.parametrize(
    "text",
    [
        "The password must have 8 characters, a digit and a sign.",
        "password = getpass.getpass()",
        "password: str | None = None",
        "api_key = os.environ['OPENAI_API_KEY']",
        "OPENAI_API_KEY=sk-...",
        "token = 'your_token_here_1234567890'",
        "tokenizer_path: data/tokenizer/spm32k_v2.model",
        "max_tokens = 1024",
        "next_token = tokens[position + 1]",
        "https://user:password@example.com",
        "postgres://${USER}:${PASS}@host",
        "git@github.com:owner/name.git",
        "commit 3f785f3a9f1d2c4b5a69788796a5b4c3d2e1f009",
        "sha256:" + hashlib.sha256(b"").hexdigest(),
        "id 123e4567-e89b-12d3-a456-426614174000",
        "sk-learn-contrib and task-1234567890abcdefghijkl",
        "hf_hub_download(repo)",
        'if "-----BEGIN ' + 'PRIVATE KEY-----" in text: raise',
        "-----BEGIN CERTIFICATE-----\n" + BASE64,
        "ghp_short",
        "AKIA and AIza are prefixes",
        "x = 'The secret: think twice before you act.'",
        "token: 12345678901234567890",
        "secret_santa_list = load_list(2024)",
        "data:image/png;base64," + BASE64,
        "password: correct horse battery staple",
        "run it with --password PASSWORD and --token YOUR_TOKEN_HERE_123",
        "a key-value store, SK and key-1234",
        "NonMaximumSuppressionModel.config.default_intersection_threshold_42",
        "TOKEN_PATH=/Users/Someone/Projects2024/Tokens99/default.json and token: /home/Me1/Files22/Keys",
        '"auth": "configuration"',
        "xoxo-love-and-kisses and sk_learn_2024_model",
        "curl -u $USER:$PASS https://h; curl -u user:password https://h",
        "the login page password reset",
        "https://h/page?sig=v1&signature=" + "a" * 44,
        hashlib.sha1(b"").hexdigest() + " " + hashlib.md5(b"").hexdigest() + " file_pat = 'data_2024_*.json'",
    ],
)
def test_prose_and_code_stay(text):
    """Guards against redaction that eats data: names, hashes, placeholders, code about secrets."""
    assert redact(text) == (text, [])


def test_no_text_makes_redaction_slow():
    """Guards against a regular expression that takes minutes on a crafted line."""
    for text in (
        "-" * 200_000,
        "eyJ" * 60_000,
        "-----BEGIN " * 15_000,
        "ghp_" * 50_000,
        "A" * 200_000,
        "password=" * 20_000,
        "://" * 60_000,
        "A1b2C3d4\n" * 20_000,
        "Private-Lines: 1\n" + "A" * 200_000,
        "Private-Lines: 1\n" * 10_000,
        "curl " * 30_000,
        "curl -u a:" * 20_000,
        "MDAw" * 50_000,
        '"auth": "' * 20_000,
        "sk-proj-" + "A1b2C3d4\n" * 20_000,
        "\n>" * 100_000,
    ):
        redact(text)
