//! HTTP agents: one for each way of trusting and reaching an origin, made when first needed.
//!
//! Most origins share one agent (system certificates, verification). A host with a directory under `certs.d` or in
//! the list of insecure registries gets its own, so that no exception made for one host is valid for another.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use coracle_base::Cancel;
use rustls::crypto::CryptoProvider;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, TlsProvider, parse_pem};
use ureq::unversioned::transport::{ConnectProxyConnector, Connector, RustlsConnector};
use ureq::{Agent, Proxy};

use crate::config::Config;
use crate::error::RegistryError;
use crate::url::Origin;
use crate::wire::{CancelResolver, WireConnector};

const HEADER_BYTES_MAX: usize = 64 << 10;
const CERT_FILE_BYTES_MAX: u64 = 1 << 20;
/// Enough for a TLS record and a good part of a socket's buffer.
const INPUT_BUFFER_BYTES: usize = 128 << 10;
/// The head of a request must fit, with the longest token in it.
const OUTPUT_BUFFER_BYTES: usize = 96 << 10;

/// How an origin's certificate is judged.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Trust {
    /// Plain http: not at all.
    Plain,
    /// By the system's certificates.
    System,
    /// By the system's certificates and those in the directory, which may also hold a client certificate.
    Directory(PathBuf),
    /// Not: a registry that the user listed as insecure, or on loopback.
    Unchecked(String),
}

/// The agents of one client.
#[derive(Debug)]
pub(crate) struct Agents {
    config: Config,
    cancel: Cancel,
    agents: Mutex<BTreeMap<(Trust, Option<String>), Agent>>,
    provider: OnceLock<Arc<CryptoProvider>>,
    system_roots: OnceLock<Vec<Certificate<'static>>>,
}

impl Agents {
    pub(crate) fn new(config: Config, cancel: Cancel) -> Self {
        let agents = Mutex::new(BTreeMap::new());
        Self { config, cancel, agents, provider: OnceLock::new(), system_roots: OnceLock::new() }
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// The agent for an origin.
    pub(crate) fn get(&self, origin: &Origin) -> Result<Agent, RegistryError> {
        let key = (self.trust(origin), self.config.proxies.choose(origin).map(str::to_owned));
        if let Some(agent) = self.locked().get(&key) {
            return Ok(agent.clone());
        }
        let agent = self.build(&key.0, key.1.as_deref())?;
        Ok(self.locked().entry(key).or_insert(agent).clone())
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, BTreeMap<(Trust, Option<String>), Agent>> {
        self.agents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn trust(&self, origin: &Origin) -> Trust {
        if !origin.https {
            return Trust::Plain;
        }
        let unchecked = || Trust::Unchecked(origin.authority());
        if self.config.is_insecure(origin) {
            return unchecked();
        }
        match self.cert_dir(origin) {
            Some(dir) => Trust::Directory(dir),
            None if origin.is_loopback() => unchecked(),
            None => Trust::System,
        }
    }

    /// The first directory `<host:port>` or `<host>` (for the usual port) there is.
    pub(crate) fn cert_dir(&self, origin: &Origin) -> Option<PathBuf> {
        let names = [format!("{}:{}", origin.host, origin.port), origin.authority()];
        let all = self.config.cert_dirs.iter().flat_map(|dir| names.iter().map(move |name| dir.join(name)));
        all.into_iter().find(|dir| dir.is_dir())
    }

    fn build(&self, trust: &Trust, proxy: Option<&str>) -> Result<Agent, RegistryError> {
        let proxy = proxy.map(parse_proxy).transpose()?;
        let timeouts = &self.config.timeouts;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(proxy)
            .user_agent(&self.config.user_agent)
            .accept("")
            .accept_encoding("identity")
            .timeout_resolve(Some(timeouts.connect))
            .timeout_connect(Some(timeouts.connect))
            .timeout_send_request(Some(timeouts.first_byte))
            .timeout_recv_response(Some(timeouts.first_byte))
            .timeout_per_read(Some(timeouts.stall))
            .max_response_header_size(HEADER_BYTES_MAX)
            .input_buffer_size(INPUT_BUFFER_BYTES)
            .output_buffer_size(OUTPUT_BUFFER_BYTES)
            .tls_config(self.tls(trust)?)
            .build();
        let connector =
            ().chain(ConnectProxyConnector::default())
                .chain(WireConnector(self.cancel.clone()))
                .chain(RustlsConnector::default());
        Ok(Agent::with_parts(config, connector, CancelResolver(self.cancel.clone())))
    }

    fn tls(&self, trust: &Trust) -> Result<TlsConfig, RegistryError> {
        let provider = self.provider.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider()));
        let (roots, client) = match trust {
            // A plain agent never makes TLS, but its settings must name roots.
            Trust::Plain | Trust::Unchecked(_) => (Vec::new(), None),
            Trust::System => (self.system_roots()?.to_vec(), None),
            Trust::Directory(dir) => {
                let (own, client) = read_cert_dir(dir, provider)?;
                // Without system certificates the directory's own are enough.
                let mut roots = self.system_roots().map(<[_]>::to_vec).unwrap_or_default();
                roots.extend(own);
                (roots, client)
            }
        };
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(RootCerts::new_with_certs(&roots))
            .client_cert(client)
            .disable_verification(matches!(trust, Trust::Unchecked(_)))
            .unversioned_rustls_crypto_provider(Arc::clone(provider));
        Ok(tls.build())
    }

    fn system_roots(&self) -> Result<&[Certificate<'static>], RegistryError> {
        if let Some(roots) = self.system_roots.get() {
            return Ok(roots);
        }
        let found = rustls_native_certs::load_native_certs();
        if found.certs.is_empty() {
            let reason =
                found.errors.first().map_or_else(|| "none was found".to_owned(), ToString::to_string);
            let subject = "the system's CA certificates (package ca-certificates)".to_owned();
            return Err(RegistryError::Setup { subject, reason });
        }
        let roots = found.certs.iter().map(|cert| Certificate::from_der(cert).to_owned()).collect();
        Ok(self.system_roots.get_or_init(|| roots))
    }
}

/// Reads `http://[user:password@]host[:port]`; `http://` may be left out. The secret never gets into an error.
fn parse_proxy(text: &str) -> Result<Proxy, RegistryError> {
    let text = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let shown = text.rsplit('@').next().unwrap_or_default();
    let subject = || format!("proxy {shown:?}");
    match text.split("://").next() {
        Some("http" | "https") => Proxy::new(&text),
        _ => {
            let reason = "only http:// and https:// proxies are supported".to_owned();
            return Err(RegistryError::Setup { subject: subject(), reason });
        }
    }
    .map_err(|_cause| RegistryError::Setup { subject: subject(), reason: "it is not a URL".to_owned() })
}

/// CAs (`*.crt`) and a client certificate (`*.cert` with `*.key`).
fn read_cert_dir(
    dir: &Path,
    provider: &CryptoProvider,
) -> Result<(Vec<Certificate<'static>>, Option<ClientCert>), RegistryError> {
    let setup =
        |path: &Path, reason: String| RegistryError::Setup { subject: path.display().to_string(), reason };
    let entries = std::fs::read_dir(dir).map_err(|error| setup(dir, error.to_string()))?;
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(|error| setup(dir, error.to_string()))?.path());
    }
    paths.sort();
    let (mut roots, mut client) = (Vec::new(), None);
    for path in paths {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => {
                let (certs, _) = read_pem(&path)?;
                if certs.is_empty() {
                    return Err(setup(&path, "it holds no certificate in PEM form".to_owned()));
                }
                roots.extend(certs);
            }
            Some("cert") => {
                let (certs, _) = read_pem(&path)?;
                let (_, key) = read_pem(&path.with_extension("key"))?;
                let key = key.ok_or_else(|| setup(&path, "its .key file holds no private key".to_owned()))?;
                check_pair(&certs, &key, provider).map_err(|error| setup(&path, error.to_string()))?;
                client = Some(ClientCert::new_with_certs(&certs, key));
            }
            _ => {}
        }
    }
    Ok((roots, client))
}

/// Whether key and certificate belong together. `ureq` takes it for granted and panics otherwise.
fn check_pair(
    certs: &[Certificate<'static>],
    key: &PrivateKey<'static>,
    provider: &CryptoProvider,
) -> Result<(), rustls::Error> {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let der = PrivateKeyDer::try_from(key.der().to_vec())
        .map_err(|reason| rustls::Error::General(reason.to_owned()))?;
    let chain = certs.iter().map(|cert| CertificateDer::from(cert.der().to_vec())).collect();
    rustls::sign::CertifiedKey::from_der(chain, der, provider).map(drop)
}

fn read_pem(path: &Path) -> Result<(Vec<Certificate<'static>>, Option<PrivateKey<'static>>), RegistryError> {
    let setup = |reason: String| RegistryError::Setup { subject: path.display().to_string(), reason };
    let bytes =
        crate::credentials::read_bounded(path, CERT_FILE_BYTES_MAX).map_err(|e| setup(e.to_string()))?;
    let (mut certs, mut key) = (Vec::new(), None);
    for item in parse_pem(&bytes) {
        match item.map_err(|error| setup(error.to_string()))? {
            PemItem::Certificate(cert) => certs.push(cert),
            PemItem::PrivateKey(found) => key = Some(found),
            _ => {}
        }
    }
    Ok((certs, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxys_password_is_in_no_error() {
        for text in ["http://user:geheim@[bad", "socks5://user:geheim@x"] {
            let error = parse_proxy(text).unwrap_err().to_string();
            assert!(!error.contains("geheim"), "{error}");
        }
        assert_eq!(parse_proxy("proxy:3128").unwrap().port(), 3128);
        assert_eq!(parse_proxy("http://u:p@proxy:3128").unwrap().username(), Some("u"));
    }
}
