"""Which URLs and addresses the service may ask by itself."""
import pytest

from app.config import SettingsError
from app.outbound import addresses
from app.outbound.addresses import NotAllowed, check_url, is_allowed

PREFIXES = ("https://example.org/a", "http://pictures.example.org:8080", "https://*.example.net/x/", "s3://bucket/in/",
            "s3://whole")


@pytest.mark.parametrize(("url", "normal"), [
    ("https://example.org/a/cat.jpg", "https://example.org/a/cat.jpg"),
    ("https://example.org/a", "https://example.org/a"),
    ("HTTPS://EXAMPLE.org:443/a/cat.jpg?w=1&u=http://x/#part", "https://example.org/a/cat.jpg?w=1&u=http://x/"),
    ("https://example.org/%61/c%2fd%7ex.jpg", "https://example.org/a/c%2Fd~x.jpg"),
    ("https://example.org/a/bücher.jpg", "https://example.org/a/b%C3%BCcher.jpg"),
    ("http://pictures.example.org:8080", "http://pictures.example.org:8080/"),
    ("https://one.two.example.net/x/1", "https://one.two.example.net/x/1"),
    ("s3://bucket/in/cat.jpg", "s3://bucket/in/cat.jpg"),
    ("s3://bucket/in/100%25 off", "s3://bucket/in/100%25 off"),
    ("s3://whole/cat.jpg", "s3://whole/cat.jpg"),
])
def test_urls_below_an_allowed_prefix_are_allowed(url, normal):
    assert check_url(url, PREFIXES, ()).url == normal


@pytest.mark.parametrize("url", [
    "https://example.org/", "https://example.org/ab/cat.jpg", "http://example.org/a/cat.jpg",
    "https://example.org:8443/a/cat.jpg", "https://example.org:80/a/cat.jpg", "https://example.org.evil.test/a/x",
    "https://evil.test/https://example.org/a/", "https://evilexample.org/a/x", "https://sub.example.org/a/x",
    "http://pictures.example.org/x", "https://example.net/x/1", "https://badexample.net/x/1",
    "https://one.example.net/y", "s3://bucket/other", "s3://bucket/in", "s3://bucket/inner/x", "s3://whole2/x",
    "s3://whole/", "s3://bucket/in/x?versionId=3", "s3://whole/a//b", "s3://whole/../bucket/x",
    "https://example.org/a/../secret", "https://example.org/a/%2e%2e/secret", "https://example.org/a/.%2E/secret",
    "https://example.org/a/%252e%252e/secret", "https://example.org/a/..%2fsecret", "https://example.org/a/..;/secret",
    "https://example.org/a/..%5csecret", "https://example.org/a//x", "https://example.org//a/x",
    "https://example.org/a/%2f/x", "https://example.org/a/%00", "https://example.org/a/%zz",
])
def test_urls_beside_the_allowed_prefixes_are_not(url):
    with pytest.raises(NotAllowed):
        check_url(url, PREFIXES, ())


@pytest.mark.parametrize("url", [
    "", "example.org", "//example.org/x", "file:///etc/passwd", "ftp://example.org/x", "gopher://example.org/", "s3://b/k",
    "data:text/plain,x", "javascript:alert(1)", "http:/example.org", "http:example.org", "http://", "http:///x",
    "http://user@example.org/", "http://user:secret@example.org/", "http://example.org@evil.test/",
    "http://example.org:80@evil.test/", "http://example.org\\@evil.test/", "http://example.org\\.evil.test/",
    "http://exam\tple.org/", "http://example.org\n/", " http://example.org/", "http://example.org/a b",
    "http://example.org/\x00", "http://example.org\r\nHost: evil.test/", "http://example.org:/", "http://example.org:0/",
    "http://example.org:99999/", "http://example.org:8080/", "http://example.org:22/", "https://example.org:80/",
    "http://example.org./", "http://.example.org/", "http://example..org/", "http://-a.org/", "http://%65xample.org/",
    "http://127.0.0.1%2f.example.org/", "http://exa%6dple.org/", "http://ex*mple.org/", "http://[::1/", "http://::1/",
    "http://[fe80::1%25eth0]/", "http://[v1.x]/", f"http://{'a' * 64}.org/", f"http://{'a.' * 130}org/",
    f"http://{'ü' * 1000}/", f"http://example.org/{'a' * 5000}", None, 5, ["http://example.org/"],
])
def test_what_clients_could_read_in_more_than_one_way_is_no_url(url):
    with pytest.raises(NotAllowed):
        check_url(url, None, ())


@pytest.mark.parametrize("host", [
    "127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
    "255.255.255.255", "198.18.0.1", "192.0.2.1", "240.0.0.1", "168.63.129.16", "localhost", "LOCALHOST", "a.localhost",
    "2130706433", "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1", "017700000001", "127.0.0.1.", "127.0.0", "1.2.3.4.5",
    "0x", "256.1.1.1", "example.123", "example.0x7f", "１２７.０.０.１", "127。0。0。1", "⑫7.0.0.1", "ⓛocalhost",
    "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[fe80::1]",
    "[fc00::1]", "[fd00:ec2::254]", "[ff02::1]", "[2002:7f00:1::]", "[2002:a00:1::1]", "[64:ff9b::7f00:1]",
    "[64:ff9b::169.254.169.254]", "[64:ff9b:1::1]", "[2001::1]", "[2001:db8::1]", "[fec0::1]", "[100::1]", "[4000::1]",
    "[3fff::1]", "192.0.0.192", "[2002:c000:c0::]", "[::ffff:192.0.0.192]",
])
def test_hosts_that_are_private_addresses_in_any_notation_are_refused(host):
    with pytest.raises(NotAllowed):
        check_url(f"http://{host}/", None, ())


@pytest.mark.parametrize(("host", "normal"), [
    ("8.8.8.8", "8.8.8.8"), ("[2606:4700:4700:0:0:0:0:1111]", "[2606:4700:4700::1111]"),
    ("[64:ff9b::808:808]", "[64:ff9b::808:808]"), ("MÜNCHEN.example", "xn--mnchen-3ya.example"),
    ("faß.example", "xn--fa-hia.example"), ("a_b.example", "a_b.example"), ("１x.example", "1x.example"),
])
def test_hosts_of_the_internet_are_allowed(host, normal):
    assert check_url(f"http://{host}/", None, ()).host == normal


def test_a_look_alike_of_an_allowed_host_is_another_host():
    with pytest.raises(NotAllowed):
        check_url("https://ex\u0430mple.org/a/x", PREFIXES, ())  # a Cyrillic a
    assert check_url("https://münchen.example/x", ("https://xn--mnchen-3ya.example",), ())
    assert check_url("https://xn--mnchen-3ya.example/x", ("https://xn--mnchen-3ya.example",), ())


def test_subdomains_are_no_addresses():
    with pytest.raises(NotAllowed):
        check_url("http://10.0.0.1/", ("http://*.0.0.1/",), ("10.0.0.0/8",))


def test_private_networks_are_reached_if_the_settings_say_so():
    assert check_url("http://10.1.2.3/", None, ("10.0.0.0/8",)).host == "10.1.2.3"
    assert is_allowed("::ffff:10.1.2.3", ("10.0.0.0/8",))
    assert is_allowed("fd00::5", ("10.0.0.0/8", "fd00::/16"))
    for other in ("11.1.2.3", "8.8.8.8", "2606:4700:4700::1111"):
        assert is_allowed(other, ("10.0.0.0/8",))
    for other in ("127.0.0.1", "192.168.0.1", "::1", "fd01::5", "no address", "fe80::1%eth0"):
        assert not is_allowed(other, ("10.0.0.0/8", "fd00::/16"))


@pytest.mark.parametrize("prefix", ["https://example.org/a/../b", "https://1.2.3/", "s3://a..b/", "https://[::1::]/"])
def test_a_prefix_that_no_url_could_have_is_a_mistake_in_the_settings(prefix):
    with pytest.raises(SettingsError, match="INPUT_URLS"):
        addresses.check_prefixes("INPUT_URLS", ("https://example.org/", prefix))
