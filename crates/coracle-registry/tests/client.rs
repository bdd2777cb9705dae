//! The client against a registry that misbehaves.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test, in its helpers too")]

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coracle_base::progress::{ProgressEvent, Silent};
use coracle_base::{Cancel, Explain, Kind, Progress, Redacted};
use coracle_oci::{Descriptor, Digest, Document, Reference, media};
use coracle_registry::fake::{Access, Fake, Fault};
use coracle_registry::{Client, Config, Credential, CredentialSource, RegistryError, Timeouts};

const MANIFEST: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}"#;

#[derive(Debug, Default)]
struct Users(BTreeMap<String, Credential>);

impl CredentialSource for Users {
    fn get(&self, host: &str) -> Result<Option<Credential>, RegistryError> {
        Ok(self.0.get(host).cloned())
    }
}

#[derive(Default)]
struct Log(Mutex<Vec<String>>);

impl Progress for Log {
    fn event(&self, event: ProgressEvent<'_>) {
        if let ProgressEvent::Status { status, .. } = event {
            self.0.lock().unwrap().push(status.to_owned());
        }
    }
}

fn quick() -> Config {
    let timeouts = Timeouts {
        connect: Duration::from_secs(5),
        first_byte: Duration::from_millis(500),
        stall: Duration::from_millis(300),
        retry: Duration::from_millis(2),
    };
    Config { timeouts, cert_dirs: Vec::new(), ..Config::default() }
}

fn config_with(host: &str, credential: Credential) -> Config {
    let users = Users(BTreeMap::from([(host.to_owned(), credential)]));
    Config { credentials: Arc::new(users), ..quick() }
}

fn password(secret: &str) -> Credential {
    Credential::Password { username: "ann".to_owned(), password: Redacted::new(secret.to_owned()) }
}

fn client(config: &Config) -> Client {
    Client::new(config, &Cancel::new())
}

struct Setting {
    fake: Fake,
    reference: Reference,
    digest: Digest,
}

fn setting() -> Setting {
    let fake = Fake::start().unwrap();
    let digest = fake.put_manifest("acme/api", "1", media::OCI_MANIFEST, MANIFEST);
    let reference = Reference::parse(&format!("{}/acme/api:1", fake.host())).unwrap();
    Setting { fake, reference, digest }
}

impl Setting {
    fn pull(&self) -> Result<coracle_registry::Fetched, RegistryError> {
        self.pull_with(&quick())
    }
    fn pull_with(&self, config: &Config) -> Result<coracle_registry::Fetched, RegistryError> {
        client(config).manifest(&self.reference, &Silent)
    }
    fn error(&self) -> (Kind, String) {
        let error = self.pull().unwrap_err();
        (error.kind(), coracle_base::explain::chain(&error))
    }
}

#[test]
fn a_manifest_comes_with_its_digest_and_type() {
    let set = setting();
    let fetched = set.pull().unwrap();
    assert_eq!((fetched.bytes.as_slice(), &fetched.digest), (MANIFEST, &set.digest));
    assert!(matches!(fetched.document().unwrap(), Document::Manifest(_)));
    let by_digest = set.reference.with_digest(set.digest.clone());
    assert_eq!(client(&quick()).manifest(&by_digest, &Silent).unwrap(), fetched);
    let resolved = client(&quick()).resolve(&set.reference, &Silent).unwrap();
    assert_eq!((resolved.digest, resolved.size), (set.digest.clone(), Some(MANIFEST.len() as u64)));
    let first = &set.fake.seen()[0];
    assert_eq!(first.headers["accept-encoding"], "identity");
    assert_eq!(first.headers["accept"].split(", ").count(), 4);
    assert!(first.headers["user-agent"].starts_with("coracle/"));
    assert!(!first.headers.contains_key("authorization"));
    client(&quick()).ping(&set.fake.host()).unwrap();
}

#[test]
fn what_is_not_there_is_said_in_dockers_words() {
    let set = setting();
    let missing = set.reference.with_tag("nope").unwrap();
    let error = client(&quick()).manifest(&missing, &Silent).unwrap_err();
    let text = format!(
        "manifest for {}/acme/api:nope not found: manifest unknown: manifest unknown",
        set.fake.host()
    );
    assert_eq!((error.kind(), error.to_string()), (Kind::NotFound, text));
    let error = client(&quick()).resolve(&missing, &Silent).unwrap_err();
    assert!(error.to_string().ends_with("not found: manifest unknown: manifest unknown"), "{error}");

    set.fake.set_access(Access::Basic("ann".to_owned(), "right".to_owned()));
    let error = set.pull().unwrap_err();
    let text = format!(
        "pull access denied for {}/acme/api, repository does not exist or may require 'coracle login': unauthorized: \
         authentication required",
        set.fake.host()
    );
    assert_eq!(error.to_string(), text);
    assert!(error.hint().unwrap().contains(&format!("coracle login {}", set.fake.host())));
}

#[test]
fn a_closed_port_is_named_and_not_retried() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    drop(listener);
    let reference = Reference::parse(&format!("{host}/x:1")).unwrap();
    let log = Log::default();
    let error = client(&quick()).manifest(&reference, &log).unwrap_err();
    let text = coracle_base::explain::chain(&error);
    assert!(text.contains(&host) && text.to_lowercase().contains("connection refused"), "{text}");
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(log.0.lock().unwrap().is_empty());
}

#[test]
fn basic_credentials_go_to_their_registry_only_after_it_asked() {
    let set = setting();
    set.fake.set_access(Access::Basic("ann".to_owned(), "right".to_owned()));
    set.pull_with(&config_with(&set.fake.host(), password("right"))).unwrap();
    let seen = set.fake.seen();
    assert_eq!(seen.len(), 2);
    assert!(!seen[0].headers.contains_key("authorization") && seen[1].headers.contains_key("authorization"));
    let error = set.pull_with(&config_with(&set.fake.host(), password("wrong"))).unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }), "{error}");
    assert!(!error.to_string().contains("wrong"));
}

#[test]
fn a_token_is_fetched_once_and_renewed_when_it_is_refused() {
    let set = setting();
    let user = Some(("ann".to_owned(), "right".to_owned()));
    set.fake.set_access(Access::Bearer { realm: None, user, identity: None });
    let config = config_with(&set.fake.host(), password("right"));
    let client = client(&config);
    client.manifest(&set.reference, &Silent).unwrap();
    client.manifest(&set.reference, &Silent).unwrap();
    let tokens = || set.fake.seen().iter().filter(|seen| seen.path.starts_with("/token")).count();
    assert_eq!(tokens(), 1);
    let asked = set.fake.seen().into_iter().find(|seen| seen.path.starts_with("/token")).unwrap();
    assert!(
        asked.path.contains("service=fake") && asked.path.contains("scope=repository%3Aacme%2Fapi%3Apull")
    );
    set.fake.revoke_tokens();
    client.manifest(&set.reference, &Silent).unwrap();
    assert_eq!(tokens(), 2);
    let error = set.pull_with(&config_with(&set.fake.host(), password("wrong"))).unwrap_err();
    assert!(error.to_string().contains("unauthorized: incorrect username or password"), "{error}");
}

#[test]
fn what_a_token_server_refuses_to_strangers_is_about_rights() {
    let set = setting();
    set.fake.set_access(Access::Bearer {
        realm: None,
        user: Some(("ann".to_owned(), "x".to_owned())),
        identity: None,
    });
    let error = set.pull().unwrap_err();
    assert!(
        matches!(&error, RegistryError::AccessDenied { repository, .. } if repository.ends_with("/acme/api"))
    );
}

#[test]
fn tokens_are_bounded() {
    let set = setting();
    set.fake.set_access(Access::Bearer { realm: None, user: None, identity: None });
    let token = |n: usize| Fault::Chunked(format!(r#"{{"access_token":"{}"}}"#, "t".repeat(n)).into_bytes());
    // A token of the greatest length is used (and is not one that this registry gave).
    set.fake.fail("/token", 1, token(64 << 10));
    assert!(matches!(set.pull().unwrap_err(), RegistryError::AccessDenied { .. }));
    let sent =
        set.fake.seen().into_iter().filter_map(|seen| seen.headers.get("authorization").map(String::len));
    assert_eq!(sent.max(), Some("Bearer ".len() + (64 << 10)));
    set.fake.fail("/token", 1, token((64 << 10) + 1));
    let error = set.pull().unwrap_err();
    assert!(error.to_string().contains("too long"), "{error}");
    set.fake.fail("/token", 1, Fault::Redirect("http://127.0.0.1:1/".to_owned()));
    assert!(set.pull().unwrap_err().to_string().contains("may not redirect"));
}

#[test]
fn identity_tokens_are_exchanged_by_post() {
    let set = setting();
    let user = Some(("nobody".to_owned(), "x".to_owned()));
    set.fake.set_access(Access::Bearer { realm: None, user, identity: Some("refresh".to_owned()) });
    let credential = Credential::IdentityToken(Redacted::new("refresh".to_owned()));
    set.pull_with(&config_with(&set.fake.host(), credential)).unwrap();
    let post = set.fake.seen().into_iter().find(|seen| seen.method == "POST").unwrap();
    assert!(post.body.contains("grant_type=refresh_token") && !post.path.contains("refresh"));
}

#[test]
fn a_realm_elsewhere_inside_is_not_visited() {
    let set = setting();
    let realm = Some("http://169.254.169.254/latest".to_owned());
    set.fake.set_access(Access::Bearer { realm, user: None, identity: None });
    let error = set.pull_with(&config_with(&set.fake.host(), password("right"))).unwrap_err();
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
    assert!(error.to_string().contains("token server"), "{error}");
}

#[test]
fn authorization_does_not_follow_a_redirect_to_another_origin() {
    let (set, elsewhere) = (setting(), Fake::start().unwrap());
    let layer = b"0123456789".repeat(10);
    let digest = set.fake.put_blob(&layer);
    elsewhere.put_blob(&layer);
    set.fake.set_access(Access::Basic("ann".to_owned(), "right".to_owned()));
    let to = format!("http://{}/v2/cdn/blobs/{digest}?signature=s", elsewhere.host());
    set.fake.fail("/blobs/", 10, Fault::Redirect(to));
    let config = config_with(&set.fake.host(), password("right"));
    let client = client(&config);
    client.manifest(&set.reference, &Silent).unwrap();
    let descriptor = Descriptor::new(media::OCI_LAYER, digest, 100);
    let blob = client.blob(set.reference.repository(), &descriptor, &Silent);
    let mut rest = Vec::new();
    blob.open(90).unwrap().read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"0123456789");
    let at_home = set.fake.seen().into_iter().find(|seen| seen.path.contains("/blobs/")).unwrap();
    assert!(at_home.headers.contains_key("authorization"));
    let there = &elsewhere.seen()[0];
    assert!(!there.headers.contains_key("authorization"));
    assert_eq!(there.headers["range"], "bytes=90-", "the range goes with it");
}

#[test]
fn redirects_are_counted() {
    let set = setting();
    let again = Fault::Redirect("/v2/acme/api/manifests/1".to_owned());
    set.fake.fail("/manifests/", 5, again.clone());
    assert!(set.pull().is_ok());
    set.fake.fail("/manifests/", 100, again);
    assert!(set.error().1.contains("more than 5 redirects"));
}

#[test]
fn limits_and_trouble_are_told_apart() {
    let set = setting();
    let status = |code, after: Option<&str>, body: &str| {
        let headers = after.map(|after| ("Retry-After".to_owned(), after.to_owned()));
        Fault::Status(code, headers.into_iter().collect(), body.as_bytes().to_vec())
    };
    let body = r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"slow\u001b[31m down"}]}"#;
    set.fake.fail("/manifests/", 1, status(429, None, body));
    let error = set.pull().unwrap_err();
    assert!(matches!(error, RegistryError::RateLimited { .. }));
    assert!(error.to_string().contains("toomanyrequests: slow [31m down"), "{error}");
    assert!(error.hint().unwrap().contains("login"));
    assert_eq!(set.fake.seen().len(), 1, "a quota is not asked again");

    set.fake.fail("/manifests/", 1, status(429, Some("3600"), body));
    assert!(set.pull().is_err(), "an hour is not waited for");

    let log = Log::default();
    set.fake.fail("/manifests/", 1, status(429, Some("1"), ""));
    set.fake.fail("/manifests/", 2, status(503, None, "<html>"));
    client(&quick()).manifest(&set.reference, &log).unwrap();
    assert_eq!(log.0.lock().unwrap()[0], "Retrying in 1 second");

    set.fake.fail("/manifests/", 100, status(502, None, ""));
    let before = set.fake.seen().len();
    let (kind, text) = set.error();
    assert!(kind == Kind::Unavailable && text.contains("status 502: bad gateway"), "{text}");
    assert_eq!(set.fake.seen().len() - before, 6, "the tries are bounded");
}

#[test]
fn changed_content_is_refused() {
    let set = setting();
    set.fake.fail("/manifests/", 1, Fault::Corrupt);
    let error = set.pull().unwrap_err();
    assert!(
        matches!(&error, RegistryError::WrongDigest { expected, .. } if *expected == set.digest),
        "{error}"
    );
    set.fake.fail("/manifests/", 1, Fault::DigestHeader("sha256:nonsense".to_owned()));
    assert!(matches!(set.pull().unwrap_err(), RegistryError::Protocol { .. }));

    let descriptor = Descriptor::new(media::OCI_CONFIG, set.fake.put_blob(b"{}"), 2);
    let client = client(&quick());
    let blob = client.blob(set.reference.repository(), &descriptor, &Silent);
    assert_eq!(blob.bytes(2).unwrap(), b"{}");
    assert!(blob.bytes(1).unwrap_err().to_string().contains("the limit is 1"));
    set.fake.fail("/blobs/", 1, Fault::Corrupt);
    assert!(matches!(blob.bytes(10).unwrap_err(), RegistryError::WrongDigest { .. }));
}

#[test]
fn manifests_are_bounded_whether_announced_or_not() {
    let set = setting();
    let large = vec![b' '; (4 << 20) + 1];
    set.fake.fail("/manifests/", 1, Fault::Chunked(large.clone()));
    assert!(set.error().1.contains("the limit is 4194304"));
    set.fake.fail("/manifests/", 1, Fault::Status(200, Vec::new(), large));
    assert!(set.error().1.contains("the limit is 4194304"));
}

#[test]
fn wrong_types_and_schema_1_are_refused_when_understood() {
    let set = setting();
    let refused = |media_type: &str| {
        set.fake.fail("/manifests/", 1, Fault::ContentType(media_type.to_owned()));
        set.pull().unwrap().document().unwrap_err().to_string()
    };
    assert!(refused(media::OCI_INDEX).contains("calls itself"));
    assert!(refused("text/html").contains("calls itself"));
    assert!(refused("application/vnd.docker.distribution.manifest.v1+prettyjws").contains("schema 1"));
    set.fake.fail("/manifests/", 1, Fault::ContentType("application/json; charset=utf-8".to_owned()));
    assert!(set.pull().unwrap().document().is_ok());
}

/// Reads a blob of 100 kB through these faults.
fn read_through(faults: &[Fault]) -> (Result<Vec<u8>, String>, Vec<String>) {
    let set = setting();
    let layer: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).take(100_000).collect();
    let descriptor = Descriptor::new(media::OCI_LAYER, set.fake.put_blob(&layer), 100_000);
    let client = client(&quick());
    client.ping(&set.fake.host()).unwrap();
    for fault in faults {
        set.fake.fail("/blobs/", 1, fault.clone());
    }
    let blob = client.blob(set.reference.repository(), &descriptor, &Silent);
    let mut bytes = Vec::new();
    let read = blob.open(0).map_err(|error| coracle_base::explain::chain(&error)).and_then(|mut stream| {
        stream.read_to_end(&mut bytes).map_err(|error| coracle_base::explain::chain(&error))
    });
    let ranges = set.fake.seen().iter().filter_map(|seen| seen.headers.get("range").cloned()).collect();
    (read.map(|_| assert_eq!(bytes, layer)).map(|()| bytes), ranges)
}

#[test]
fn a_broken_stream_goes_on_where_it_ended() {
    let (read, ranges) =
        read_through(&[Fault::TruncateAfter(30_000), Fault::HangUp, Fault::TruncateAfter(20_000)]);
    read.unwrap();
    assert_eq!(ranges, ["bytes=30000-", "bytes=30000-", "bytes=50000-"]);
}

#[test]
fn a_server_without_ranges_starts_over() {
    let (read, ranges) = read_through(&[Fault::TruncateAfter(30_000), Fault::IgnoreRange]);
    read.unwrap();
    assert_eq!(ranges, ["bytes=30000-"]);
}

#[test]
fn a_server_that_refuses_ranges_starts_over() {
    let refused = Fault::Status(416, Vec::new(), Vec::new());
    let (read, ranges) = read_through(&[Fault::TruncateAfter(30_000), refused]);
    read.unwrap();
    assert_eq!(ranges, ["bytes=30000-"]);
}

#[test]
fn content_in_the_descriptor_saves_a_request() {
    let set = setting();
    let digest =
        Digest::parse("sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a").unwrap();
    let client = client(&quick());
    let read = |data: &str| {
        let descriptor = Descriptor {
            data: Some(data.to_owned()),
            ..Descriptor::new(media::OCI_CONFIG, digest.clone(), 2)
        };
        client.blob(set.reference.repository(), &descriptor, &Silent).bytes(10)
    };
    assert_eq!(read("e30=").unwrap(), b"{}");
    assert!(set.fake.seen().is_empty());
    assert!(read("e31=").is_err(), "other content is not believed, and the registry has none");
}

#[test]
fn a_stalled_stream_is_given_up_and_taken_up_again() {
    let (read, ranges) = read_through(&[Fault::StallAfter(10_000)]);
    read.unwrap();
    assert_eq!(ranges, ["bytes=10000-"]);
}

#[test]
fn a_stream_that_makes_no_progress_ends_with_the_reason() {
    let (read, ranges) = read_through(&vec![Fault::TruncateAfter(0); 50]);
    assert!(read.unwrap_err().contains("ended before the answer was complete"));
    assert_eq!(ranges.len(), 0, "nothing was read, so everything was asked for");
}

#[test]
fn a_blob_of_another_size_is_refused() {
    let (read, _) = read_through(&[Fault::Status(200, Vec::new(), vec![0; 100_001])]);
    assert!(read.unwrap_err().contains("100001 bytes, not 100000"));
    let (read, _) = read_through(&[Fault::Chunked(vec![0; 100_001])]);
    assert!(read.unwrap_err().contains("more than the 100000 bytes"));
    let gone = Fault::Status(404, Vec::new(), Vec::new());
    assert!(read_through(&[gone]).0.unwrap_err().contains("not found"));
}

#[test]
fn cancelling_ends_a_stalled_read_within_a_moment() {
    let set = setting();
    let descriptor = Descriptor::new(media::OCI_LAYER, set.fake.put_blob(&[7; 1000]), 1000);
    let cancel = Cancel::new();
    let config = Config { timeouts: Timeouts::default(), ..quick() };
    let client = Client::new(&config, &cancel);
    client.ping(&set.fake.host()).unwrap();
    set.fake.fail("/blobs/", 1, Fault::StallAfter(500));
    let blob = client.blob(set.reference.repository(), &descriptor, &Silent);
    let mut stream = blob.open(0).unwrap();
    let mut half = [0; 500];
    stream.read_exact(&mut half).unwrap();
    let ended = std::thread::scope(|scope| {
        let reader = scope.spawn(|| stream.read(&mut [0; 10]).unwrap_err());
        let started = coracle_base::time::monotonic();
        cancel.cancel();
        let error = reader.join().unwrap();
        assert!(matches!(RegistryError::from_read("", error), RegistryError::Canceled));
        started.elapsed()
    });
    assert!(ended < Duration::from_secs(1), "{ended:?}");
    assert!(matches!(set.pull_canceled(&cancel), RegistryError::Canceled));
}

impl Setting {
    fn pull_canceled(&self, cancel: &Cancel) -> RegistryError {
        Client::new(&quick(), cancel).manifest(&self.reference, &Silent).unwrap_err()
    }
}

#[test]
fn a_mirror_is_asked_first_and_passed_over_when_it_fails() {
    let (set, mirror) = (setting(), Fake::start().unwrap());
    let config = Config {
        mirrors: BTreeMap::from([(set.fake.host(), vec![format!("http://{}/cache", mirror.host())])]),
        ..config_with(&set.fake.host(), password("right"))
    };
    assert_eq!(set.pull_with(&config).unwrap().digest, set.digest, "the mirror does not have it");
    assert_eq!((mirror.seen().len(), set.fake.seen().len()), (1, 1));
    mirror.put_manifest("acme/api", "1", media::OCI_MANIFEST, MANIFEST);
    set.pull_with(&config).unwrap();
    assert_eq!((mirror.seen().len(), set.fake.seen().len()), (2, 1));
    let seen = &mirror.seen()[1];
    let port = set.fake.host().rsplit(':').next().unwrap().to_owned();
    assert_eq!(seen.path, format!("/cache/v2/acme/api/manifests/1?ns=127.0.0.1%3A{port}"));
    mirror.set_access(Access::Basic("ann".to_owned(), "right".to_owned()));
    set.pull_with(&config).unwrap();
    let leaked = mirror.seen().iter().any(|seen| seen.headers.contains_key("authorization"));
    assert!(!leaked, "the registry's password is not the mirror's");
}

#[test]
fn tags_are_listed_over_all_pages() {
    let set = setting();
    for tag in ["2", "3", "4", "5"] {
        set.fake.put_manifest("acme/api", tag, media::OCI_MANIFEST, MANIFEST);
    }
    let client = client(&quick());
    assert_eq!(client.tags(set.reference.repository(), &Silent).unwrap(), ["1", "2", "3", "4", "5"]);
    let unknown = Reference::parse(&format!("{}/no/such", set.fake.host())).unwrap();
    let error = client.tags(unknown.repository(), &Silent).unwrap_err();
    assert!(error.to_string().contains("name unknown"), "{error}");
}
