//! TLS 1.3 with pinned keys on both sides: no certificate authority, no older version, no resumption, no early data.

use crate::format::PROTOCOL;
use crate::link::key::HostKey;
use crate::link::pairing::Pairing;
use crate::link::peers::Pins;
use crate::model::{Fault, Res};
use std::sync::Arc;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{CryptoProvider, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::server::{NoServerSessionStorage, ParsedCertificate};
use tokio_rustls::rustls::sign::SingleCertAndKey;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
};

/// What an ordinary connection calls itself; the version stands in it, so that two versions part before a byte is misread.
pub(in crate::link) fn alpn() -> Vec<u8> {
    format!("doublure/{PROTOCOL}").into_bytes()
}

/// What a connection that only wants to pair calls itself.
pub(in crate::link) const ALPN_PAIR: &[u8] = b"doublure-pair/1";

/// TLS records waiting to be written by one connection, in bytes: enough to make each write to the socket a large one.
pub(in crate::link) const RECORDS_BYTES: usize = 512 << 10;

/// The cryptography that is used, whatever a process-wide default says.
pub(in crate::link) fn provider() -> Arc<CryptoProvider> {
    Arc::new(tokio_rustls::rustls::crypto::ring::default_provider())
}

/// blake3 of the certificate's public key info. The certificate around the key is of no interest.
pub(in crate::link) fn fingerprint(certificate: &CertificateDer<'_>) -> Result<blake3::Hash, Error> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    Ok(blake3::hash(parsed.subject_public_key_info().as_ref()))
}

/// The listener's side. A key that is not pinned gets through only while a pairing window is open; what it may do then is
/// decided after the handshake, when its ALPN is known.
pub(in crate::link) fn server(key: &HostKey, pins: Arc<Pins>, pairing: Arc<Pairing>) -> Res<Arc<ServerConfig>> {
    let verifier = Arc::new(KnownClients { provider: provider(), pins, pairing });
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| Fault::internal("TLS", error.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from((*key.certified()).clone())));
    config.alpn_protocols = vec![alpn(), ALPN_PAIR.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// The dialler's side: `expected` is the one key that the server may have; `None` only to pair.
pub(in crate::link) fn client(key: &HostKey, expected: Option<String>, alpn: Vec<u8>) -> Res<Arc<ClientConfig>> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| Fault::internal("TLS", error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(OneServer { provider: provider(), expected }))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from((*key.certified()).clone())));
    config.alpn_protocols = vec![alpn];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// The name that TLS wants for a server. Nothing depends on it, and it is not sent.
pub(in crate::link) fn server_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into())
}

/// The refusal that becomes the alert `access_denied`, which tells the other side exactly this and nothing more.
fn denied() -> Error {
    Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

struct OneServer {
    provider: Arc<CryptoProvider>,
    expected: Option<String>,
}

impl std::fmt::Debug for OneServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OneServer")
    }
}

impl ServerCertVerifier for OneServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let found = fingerprint(end_entity)?;
        match &self.expected {
            Some(expected) if *expected != *found.to_hex() => Err(denied()),
            _ => Ok(ServerCertVerified::assertion()),
        }
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(denied())
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

struct KnownClients {
    provider: Arc<CryptoProvider>,
    pins: Arc<Pins>,
    pairing: Arc<Pairing>,
}

impl std::fmt::Debug for KnownClients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KnownClients")
    }
}

impl ClientCertVerifier for KnownClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let found = fingerprint(end_entity)?;
        match self.pins.by_fingerprint(&found.to_hex()).is_some() || self.pairing.is_open() {
            true => Ok(ClientCertVerified::assertion()),
            false => Err(denied()),
        }
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(denied())
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
