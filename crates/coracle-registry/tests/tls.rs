//! Certificates, proxies and schemes: how the client gets to a registry and whom it believes.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test, in its helpers too")]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use coracle_base::progress::Silent;
use coracle_base::{Cancel, Explain};
use coracle_oci::{Reference, media};
use coracle_registry::fake::Fake;
use coracle_registry::{Client, Config, Fetched, Proxies, RegistryError};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

const CA: &[u8] = include_bytes!("tls/ca.crt");
const OTHER_CA: &[u8] = include_bytes!("tls/other.crt");
const SERVER: &[u8] = include_bytes!("tls/server.cert");
const SERVER_KEY: &[u8] = include_bytes!("tls/server.key");
const CLIENT: &[u8] = include_bytes!("tls/client.cert");
const CLIENT_KEY: &[u8] = include_bytes!("tls/client.key");
const MANIFEST: &[u8] = b"{\"schemaVersion\":2}";

/// Something that listens on loopback, one connection after the other, until it is dropped.
struct Server {
    address: SocketAddr,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(serve: impl Fn(TcpStream) -> io::Result<()> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let accept = move || {
            for stream in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                // What goes wrong with a connection is seen by the client.
                drop(stream.and_then(&serve));
            }
        };
        Self { address, is_over, thread: Some(std::thread::spawn(accept)) }
    }

    fn reference(&self) -> Reference {
        Reference::parse(&format!("{}/a:1", self.address)).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Answers every request over TLS with one manifest.
fn tls_server(wants_client: bool) -> Server {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider));
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let builder = if wants_client {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(CA).unwrap()).unwrap();
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        builder.with_client_cert_verifier(verifier.build().unwrap())
    } else {
        builder.with_no_client_auth()
    };
    let chain = vec![CertificateDer::from_pem_slice(SERVER).unwrap()];
    let config = builder.with_single_cert(chain, PrivateKeyDer::from_pem_slice(SERVER_KEY).unwrap()).unwrap();
    let config = Arc::new(config);
    Server::start(move |stream| {
        let connection = rustls::ServerConnection::new(Arc::clone(&config)).map_err(io::Error::other)?;
        let mut tls = rustls::StreamOwned::new(connection, stream);
        read_head(&mut BufReader::new(&mut tls))?;
        let (media_type, length) = (media::OCI_MANIFEST, MANIFEST.len());
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        );
        tls.write_all(head.as_bytes())?;
        tls.write_all(MANIFEST)?;
        tls.conn.send_close_notify();
        tls.flush()
    })
}

/// The first line of a request; the rest is read and dropped.
fn read_head(reader: &mut impl BufRead) -> io::Result<String> {
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut line = first.clone();
    while !line.trim_end().is_empty() {
        line.clear();
        reader.read_line(&mut line)?;
    }
    Ok(first.trim_end().to_owned())
}

fn pull(server: &Server, cert_dir: &Path) -> Result<Fetched, RegistryError> {
    let config = Config { cert_dirs: vec![cert_dir.to_owned()], ..Config::default() };
    Client::new(&config, &Cancel::new()).manifest(&server.reference(), &Silent)
}

/// `certs.d` with a directory for the server that holds these files.
fn certs_d(server: &Server, files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join(server.address.to_string());
    std::fs::create_dir(&own).unwrap();
    for (name, bytes) in files {
        std::fs::write(own.join(name), bytes).unwrap();
    }
    dir
}

#[test]
fn loopback_may_have_any_certificate() {
    let server = tls_server(false);
    let nothing = tempfile::tempdir().unwrap();
    assert_eq!(pull(&server, nothing.path()).unwrap().bytes, MANIFEST);
}

#[test]
fn a_directory_of_its_own_decides_whom_a_registry_is_believed_by() {
    let server = tls_server(false);
    let right = certs_d(&server, &[("ca.crt", CA)]);
    assert_eq!(pull(&server, right.path()).unwrap().bytes, MANIFEST);
    let wrong = certs_d(&server, &[("ca.crt", OTHER_CA)]);
    let error = pull(&server, wrong.path()).unwrap_err();
    assert!(matches!(error, RegistryError::Tls { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains(&format!("/etc/docker/certs.d/{}/ca.crt", server.address)));
    let broken = certs_d(&server, &[("ca.crt", b"nonsense")]);
    assert!(pull(&server, broken.path()).unwrap_err().to_string().contains("no certificate"));
}

#[test]
fn a_client_certificate_is_shown_to_its_registry() {
    let server = tls_server(true);
    let with = certs_d(&server, &[("ca.crt", CA), ("client.cert", CLIENT), ("client.key", CLIENT_KEY)]);
    assert_eq!(pull(&server, with.path()).unwrap().bytes, MANIFEST);
    let without = certs_d(&server, &[("ca.crt", CA)]);
    assert!(pull(&server, without.path()).is_err());
    let mixed = certs_d(&server, &[("ca.crt", CA), ("client.cert", CLIENT), ("client.key", SERVER_KEY)]);
    let error = pull(&server, mixed.path()).unwrap_err();
    assert!(
        matches!(error, RegistryError::Setup { .. }),
        "a wrong key is said and does not panic: {error:?}"
    );
}

/// A proxy that reaches `fake` for port 80 of anything, and nothing for other ports.
fn proxy(fake: &Fake, seen: &Arc<Mutex<Vec<String>>>) -> Server {
    let (to, seen) = (fake.host(), Arc::clone(seen));
    Server::start(move |mut stream| {
        let mut reader = BufReader::new(stream.try_clone()?);
        let first = read_head(&mut reader)?;
        seen.lock().unwrap().push(first.clone());
        if !first.contains(":80 ") {
            return stream.write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n");
        }
        let upstream = TcpStream::connect(&to)?;
        stream.write_all(b"HTTP/1.1 200 Connected\r\n\r\n")?;
        let (mut from, mut into) = (upstream.try_clone()?, stream);
        let back = std::thread::spawn(move || io::copy(&mut from, &mut into).map(drop));
        io::copy(&mut reader, &mut (&upstream)).map(drop)?;
        upstream.shutdown(Shutdown::Both)?;
        back.join().unwrap()
    })
}

#[test]
fn a_proxy_is_used_and_resolves_the_name_and_insecure_registries_fall_back() {
    let fake = Fake::start().unwrap();
    fake.put_manifest("a", "1", media::OCI_MANIFEST, MANIFEST);
    let seen = Arc::default();
    let proxy = proxy(&fake, &seen);
    let url = Some(format!("http://{}", proxy.address));
    let proxies = Proxies { http: url.clone(), https: url, no_proxy: None };
    let pull = |insecure: &[&str]| {
        let insecure = insecure.iter().map(|host| (*host).to_owned()).collect();
        let config =
            Config { proxies: proxies.clone(), insecure, cert_dirs: Vec::new(), ..Config::default() };
        let reference = Reference::parse("registry.invalid/a:1").unwrap();
        Client::new(&config, &Cancel::new()).manifest(&reference, &Silent)
    };
    assert_eq!(pull(&["registry.invalid"]).unwrap().bytes, MANIFEST);
    let asked = std::mem::take(&mut *seen.lock().unwrap());
    assert_eq!(asked, ["CONNECT registry.invalid:443 HTTP/1.1", "CONNECT registry.invalid:80 HTTP/1.1"]);

    let error = pull(&[]).unwrap_err();
    let text = coracle_base::explain::chain(&error);
    assert!(text.contains("registry.invalid"), "{text}");
    let only_tls = seen.lock().unwrap().iter().all(|line| line.contains(":443 "));
    assert!(only_tls, "what is not listed is never asked in plain text");
}

#[test]
fn a_body_is_read_to_its_end_through_tls() {
    let server = tls_server(false);
    let right = certs_d(&server, &[("ca.crt", CA)]);
    let config = Config { cert_dirs: vec![right.path().to_owned()], ..Config::default() };
    let digest = coracle_registry::client::digest_of(coracle_oci::Algorithm::Sha256, MANIFEST);
    let descriptor = coracle_oci::Descriptor::new(media::OCI_LAYER, digest, MANIFEST.len() as u64);
    let client = Client::new(&config, &Cancel::new());
    let reference = server.reference();
    let blob = client.blob(reference.repository(), &descriptor, &Silent);
    let mut bytes = Vec::new();
    blob.open(0).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, MANIFEST);
}
