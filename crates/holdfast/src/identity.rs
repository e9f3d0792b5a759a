//! Who this host is in its cluster: certificates, keys, and where they are kept.

use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use holdfast_core::NodeId;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::agent::now_ms;
use crate::generation;
use crate::heartbeat::SecretKey;

/// The file in the state directory.
pub const FILE: &str = "identity.json";
/// How the directories begin in which a node that was removed keeps what it was.
const REMOVED: &str = "removed-";
/// The version of its format.
const FORMAT: u32 = 1;
/// The name that every node's certificate has beside its own.
pub const ANY_NODE: &str = "cluster.holdfast";

/// Who this host is in its cluster. Kept in [`FILE`], readable by root alone.
#[derive(Clone, Serialize, Deserialize)]
pub struct Identity {
    format: u32,
    /// The cluster.
    pub cluster: Uuid,
    /// This node.
    pub node: NodeId,
    /// The certificate of the cluster's authority, PEM.
    pub ca_certificate: String,
    /// This node's certificate, PEM.
    pub certificate: String,
    /// Its private key, PEM.
    pub key: String,
    /// The X25519 secret that heartbeats are sealed with.
    pub heartbeat: SecretKey,
}

impl Identity {
    /// Puts the parts together.
    pub fn new(
        cluster: Uuid,
        node: NodeId,
        ca_certificate: String,
        certificate: String,
        key: String,
        heartbeat: SecretKey,
    ) -> Self {
        Identity { format: FORMAT, cluster, node, ca_certificate, certificate, key, heartbeat }
    }

    /// Reads it; `None` when this host was never in a cluster.
    ///
    /// # Errors
    /// The file is damaged or cannot be read. It is left as it is.
    pub fn load(state_dir: &Path) -> Result<Option<Identity>> {
        let path = state_dir.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let damaged = || {
            format!(
                "{} is damaged. This host does not start, so that it cannot pretend to be another node. Restore the file \
                 from a backup; if there is none, remove this node from the cluster, move {} away and join it again",
                path.display(),
                state_dir.display()
            )
        };
        let identity: Identity = serde_json::from_slice(&bytes).with_context(damaged)?;
        if identity.format != FORMAT {
            bail!(
                "{} has format {}, this version of Holdfast knows {FORMAT}: start the newer version again",
                path.display(),
                identity.format
            );
        }
        identity.client_config().with_context(damaged)?;
        Ok(Some(identity))
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// The disk refuses it.
    pub fn store(&self, state_dir: &Path) -> Result<()> {
        write_durably(&state_dir.join(FILE), &serde_json::to_vec_pretty(self)?)
    }

    /// TLS for what others ask of this node. A client certificate of the cluster
    /// is verified when one is shown.
    ///
    /// # Errors
    /// The certificates or the key are not usable.
    pub fn server_config(&self) -> Result<Arc<ServerConfig>> {
        let roots = Arc::new(self.roots()?);
        let verifier = WebPkiClientVerifier::builder(roots).allow_unauthenticated().build()?;
        let mut config = ServerConfig::builder()
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain()?, self.private_key()?)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// TLS for what this node asks of others.
    ///
    /// # Errors
    /// The certificates or the key are not usable.
    pub fn client_config(&self) -> Result<ClientConfig> {
        Ok(ClientConfig::builder()
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(self.chain()?, self.private_key()?)?)
    }

    fn roots(&self) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(certificate(&self.ca_certificate)?)?;
        Ok(roots)
    }

    /// The authority's certificate goes along, so that a host that joins can
    /// compare it with what its token pins.
    fn chain(&self) -> Result<Vec<CertificateDer<'static>>> {
        Ok(vec![certificate(&self.certificate)?, certificate(&self.ca_certificate)?])
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>> {
        PrivateKeyDer::from_pem_slice(self.key.as_bytes())
            .map_err(|error| anyhow!("the private key is not usable: {error}"))
    }
}

/// Writes a file so that after a crash it is there whole, or as it was before.
///
/// # Errors
/// The disk refuses it.
pub fn write_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().context("a file is in a directory")?;
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(dir)?;
        let draft = path.with_extension("tmp");
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&draft, path)?;
        std::fs::File::open(dir)?.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

fn certificate(pem: &str) -> Result<CertificateDer<'static>> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| anyhow!("the certificate is not usable: {error}"))
}

/// The name in a node's certificate.
pub fn node_host(node: NodeId) -> String {
    format!("node-{node}.holdfast")
}

/// The node that a verified client certificate belongs to.
pub fn node_of_certificate(der: &CertificateDer<'_>) -> Option<NodeId> {
    let parsed = ParsedCertificate::try_from(der).ok()?;
    // A certificate carries its node's number as a DNS name. There are few
    // nodes, so asking for each candidate would do; the name itself is read
    // from the encoding, where it stands in plain ASCII, and then verified.
    let text = der.as_ref();
    let mut at = 0;
    while let Some(found) = text[at..].windows(5).position(|part| part == b"node-") {
        let start = at + found + 5;
        let digits: String =
            text[start..].iter().take_while(|byte| byte.is_ascii_digit()).map(|byte| char::from(*byte)).collect();
        if let Ok(number) = digits.parse() {
            let node = NodeId(number);
            let name = ServerName::try_from(node_host(node)).ok()?;
            if rustls::client::verify_server_name(&parsed, &name).is_ok() {
                return Some(node);
            }
        }
        at = start;
    }
    None
}

/// A new authority: certificate and key, PEM.
///
/// # Errors
/// No randomness.
pub fn new_authority(cluster: &str) -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, format!("Holdfast cluster {cluster}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = validity();
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

/// A key and a request to certify it, PEM: what a host sends when it joins.
///
/// # Errors
/// No randomness.
pub fn new_request() -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    let request = CertificateParams::default().serialize_request(&key)?;
    Ok((key.serialize_pem(), request.pem()?))
}

/// Certifies a node's key. Nothing of the request counts but the key.
///
/// # Errors
/// The request or the authority is not usable.
pub fn certify(
    ca_certificate: &str,
    ca_key: &str,
    request: &str,
    node: NodeId,
    addresses: &[IpAddr],
) -> Result<String> {
    let asked = CertificateSigningRequestParams::from_pem(request).context("the certificate request is not usable")?;
    let issuer = Issuer::from_ca_cert_pem(ca_certificate, KeyPair::from_pem(ca_key)?)?;
    let mut params = CertificateParams::new(vec![node_host(node), ANY_NODE.into()])?;
    params.subject_alt_names.extend(addresses.iter().map(|ip| SanType::IpAddress(*ip)));
    params.distinguished_name.push(DnType::CommonName, format!("node-{node}"));
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    (params.not_before, params.not_after) = validity();
    Ok(params.signed_by(&asked.public_key, &issuer)?.pem())
}

/// Twenty years, from a day ago: clocks of hosts differ, and an expired
/// certificate must not be what stops a cluster.
fn validity() -> (time::OffsetDateTime, time::OffsetDateTime) {
    let now = time::OffsetDateTime::now_utc();
    (now - time::Duration::days(1), now + time::Duration::days(20 * 365))
}

/// Makes this host one without a cluster: keeps what it was in a directory of its own,
/// whose path is returned. What consensus knows is set aside when the host joins again.
///
/// # Errors
/// The disk refuses it.
pub fn set_aside(state_dir: &Path) -> Result<PathBuf> {
    let kept = state_dir.join(format!("{REMOVED}{}", now_ms()));
    let cannot = || format!("cannot move {} to {}", state_dir.join(FILE).display(), kept.display());
    std::fs::create_dir(&kept).with_context(cannot)?;
    // The identity last: with it gone, this host is in no cluster.
    for file in [generation::FILE, FILE] {
        match std::fs::rename(state_dir.join(file), kept.join(file)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).with_context(cannot),
            _ => {}
        }
    }
    std::fs::File::open(state_dir).and_then(|dir| dir.sync_all()).with_context(cannot)?;
    Ok(kept)
}

/// Where a host that was removed keeps what it was; the latest when there are several.
pub fn removed(state_dir: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(state_dir).into_iter().flatten().flatten();
    let kept = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(REMOVED));
    kept.map(|entry| entry.path()).max()
}

/// SHA-256 of a certificate, in hexadecimal: what a token pins.
///
/// # Errors
/// The certificate is not usable.
pub fn pin(ca_certificate: &str) -> Result<String> {
    Ok(digest(certificate(ca_certificate)?.as_ref()))
}

/// SHA-256 in hexadecimal.
pub fn digest(bytes: &[u8]) -> String {
    hex(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref())
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// TLS towards a cluster of which only the pin of its authority is known.
pub fn pinned_client_config(pin: &str) -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Pinned { pin: pin.to_owned(), provider });
    Arc::new(ClientConfig::builder().dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

/// Trusts whoever is certified by the authority with this digest.
#[derive(Debug)]
struct Pinned {
    pin: String,
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let authority = intermediates.iter().find(|der| digest(der.as_ref()) == self.pin).ok_or_else(unknown)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &roots, intermediates, now, algorithms)?;
        rustls::client::verify_server_name(&parsed, server_name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(node: u64) -> Identity {
        let (ca, ca_key) = new_authority("test").unwrap();
        let (key, request) = new_request().unwrap();
        let certificate = certify(&ca, &ca_key, &request, NodeId(node), &["10.0.0.1".parse().unwrap()]).unwrap();
        Identity::new(Uuid::nil(), NodeId(node), ca, certificate, key, SecretKey::generate().unwrap())
    }

    #[test]
    fn a_certificate_names_its_node_and_no_other() {
        let der = certificate(&identity(17).certificate).unwrap();
        assert_eq!(node_of_certificate(&der), Some(NodeId(17)));
        let authority = certificate(&identity(17).ca_certificate).unwrap();
        assert_eq!(node_of_certificate(&authority), None);
    }

    #[test]
    fn a_host_that_was_removed_keeps_what_it_was_and_is_in_no_cluster() {
        for generations in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            assert_eq!(removed(dir.path()), None);
            identity(3).store(dir.path()).unwrap();
            if generations {
                std::fs::write(dir.path().join(generation::FILE), "{}").unwrap();
            }
            let kept = set_aside(dir.path()).unwrap();
            assert!(Identity::load(dir.path()).unwrap().is_none());
            assert_eq!(Identity::load(&kept).unwrap().unwrap().node, NodeId(3));
            assert!(!dir.path().join(generation::FILE).exists());
            assert_eq!(kept.join(generation::FILE).exists(), generations);
            assert_eq!(removed(dir.path()), Some(kept));
        }
    }

    #[test]
    fn a_damaged_file_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Identity::load(dir.path()).unwrap().is_none());
        identity(3).store(dir.path()).unwrap();
        assert_eq!(Identity::load(dir.path()).unwrap().unwrap().node, NodeId(3));
        let path = dir.path().join(FILE);
        let whole = std::fs::read(&path).unwrap();
        for damaged in [&whole[..whole.len() / 2], b"", b"{}"] {
            std::fs::write(&path, damaged).unwrap();
            let error = format!("{:#}", Identity::load(dir.path()).err().unwrap());
            assert!(error.contains(FILE) && error.contains("Restore"), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), damaged);
        }
    }
}
