"""Certificates for servers of tests."""
import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

ADDRESS = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))


def certificate(path, host=ADDRESS):
    """Write a certificate for that host, signed by itself, and its key to a file. Returns the path."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, day = x509.Name([]), datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.UTC)
    made = (x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
            .add_extension(x509.SubjectAlternativeName([host]), True).sign(key, hashes.SHA256()))
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
                     + made.public_bytes(Encoding.PEM))
    return path
