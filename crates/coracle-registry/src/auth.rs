//! Answering a registry's challenge: Basic, or a Bearer token from the server it names.
//!
//! The registry chooses the token server (`realm`), so the realm is checked before a credential is sent there:
//! the same scheme or better, no user information, and no address of this machine, its link or its private network
//! unless that is the registry's own host (CVE-2026-33540). Token requests are not redirected.
//!
//! Tokens are cached by (registry, realm, service, scope) and renewed before they expire.
//! Source: `distribution/docs/spec/auth/{token,oauth}.md`; RFC 9110 §11.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use coracle_base::Redacted;
use coracle_base::time::monotonic;
use coracle_oci::Reference;
use serde::Deserialize;
use ureq::http::Method;

use crate::agents::Agents;
use crate::credentials::Credential;
use crate::error::RegistryError;
use crate::http::{self, Answer, Ask, Failure};
use crate::url::{Origin, Url, escape};

/// Bytes of one token.
const TOKEN_BYTES_MAX: usize = 64 << 10;
/// How long a token is good for if its server does not say.
const TOKEN_SECONDS_DEFAULT: u64 = 60;
/// A token is renewed this long before its end, or at half of its life if that is short.
const TOKEN_MARGIN: Duration = Duration::from_secs(10);
const CLIENT_ID: &str = "coracle";

/// What a server wants to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User name and password.
    Basic,
    /// A token from elsewhere.
    Bearer {
        /// Where to get it.
        realm: String,
        /// For whom.
        service: String,
        /// For what; empty if it is left to the client.
        scope: String,
    },
}

/// The tokens of one client.
#[derive(Debug, Default)]
pub(crate) struct Auth {
    /// The challenge last seen for (registry, repository path).
    seen: Mutex<BTreeMap<(Origin, String), Challenge>>,
    tokens: Mutex<BTreeMap<TokenKey, Token>>,
}

type TokenKey = (Origin, String, String, String);

#[derive(Debug, Clone)]
struct Token {
    value: Redacted<String>,
    renew_at: Instant,
}

/// For whom and for what a header is needed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Purpose<'a> {
    /// The registry.
    pub origin: &'a Origin,
    /// Its name as users and credentials know it.
    pub host: &'a str,
    /// The path of the repository; empty for none.
    pub repository: &'a str,
}

impl Purpose<'_> {
    fn key(&self) -> (Origin, String) {
        (self.origin.clone(), self.repository.to_owned())
    }
}

impl Auth {
    /// The `Authorization` for a request, as far as earlier answers tell what is wanted.
    pub(crate) fn header(
        &self,
        agents: &Agents,
        purpose: Purpose<'_>,
    ) -> Result<Option<Redacted<String>>, RegistryError> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(&purpose.key()).cloned();
        let Some(challenge) = seen else { return Ok(None) };
        match challenge {
            Challenge::Basic => {
                let credential = agents.config().credentials.get(purpose.host)?;
                Ok(credential.as_ref().and_then(basic))
            }
            Challenge::Bearer { realm, service, scope } => {
                let key = (purpose.origin.clone(), realm, service, scope);
                let cached = self.tokens.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
                let token = match cached.filter(|token| monotonic() < token.renew_at) {
                    Some(token) => token,
                    None => {
                        let token = fetch_token(agents, purpose, &key)?;
                        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).insert(key, token.clone());
                        token
                    }
                };
                Ok(Some(Redacted::new(format!("Bearer {}", token.value.reveal()))))
            }
        }
    }

    /// Remembers what a 401 asks for. Returns whether asking again with [`Auth::header`] can change anything.
    pub(crate) fn learn(
        &self,
        agents: &Agents,
        purpose: Purpose<'_>,
        challenges: &[String],
    ) -> Result<bool, RegistryError> {
        let challenges: Vec<Challenge> = challenges.iter().flat_map(|text| parse(text)).collect();
        let bearer = challenges.iter().find(|challenge| matches!(challenge, Challenge::Bearer { .. }));
        let challenge = match bearer.or_else(|| challenges.first()).cloned() {
            Some(Challenge::Bearer { realm, service, scope }) => {
                check_realm(purpose.origin, &realm)?;
                let scope = match (scope.is_empty(), purpose.repository) {
                    (false, _) => scope,
                    (true, "") => String::new(),
                    (true, repository) => format!("repository:{repository}:pull"),
                };
                let key = (purpose.origin.clone(), realm.clone(), service.clone(), scope.clone());
                // Whatever token was sent, it was not good enough.
                self.tokens.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
                Challenge::Bearer { realm, service, scope }
            }
            Some(Challenge::Basic) => {
                if agents.config().credentials.get(purpose.host)?.as_ref().and_then(basic).is_none() {
                    return Ok(false);
                }
                Challenge::Basic
            }
            None => return Ok(false),
        };
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(purpose.key(), challenge);
        Ok(true)
    }

    /// Whether a 401 means that the password which was sent is wrong, and not that rights are missing.
    pub(crate) fn is_refused(&self, agents: &Agents, host: &str, challenges: &[String]) -> bool {
        let asks_password = challenges.iter().flat_map(|text| parse(text)).all(|c| c == Challenge::Basic);
        let credential = agents.config().credentials.get(host);
        !challenges.is_empty() && asks_password && credential.is_ok_and(|credential| credential.is_some())
    }
}

/// The header for user name and password, if that is what the credential is.
fn basic(credential: &Credential) -> Option<Redacted<String>> {
    match credential {
        Credential::Password { username, password } => {
            let pair = BASE64_STANDARD.encode(format!("{username}:{}", password.reveal()));
            Some(Redacted::new(format!("Basic {pair}")))
        }
        Credential::IdentityToken(_) => None,
        Credential::RegistryToken(token) => Some(Redacted::new(format!("Bearer {}", token.reveal()))),
    }
}

fn check_realm(registry: &Origin, realm: &str) -> Result<Url, RegistryError> {
    let refuse = |reason: &str| RegistryError::Protocol {
        host: registry.authority(),
        reason: format!("its token server {:?} {reason}", http::printable(realm)),
    };
    let url = Url::parse(realm).ok_or_else(|| refuse("is not a URL"))?;
    if registry.https && !url.origin.https {
        return Err(refuse("is to be reached without encryption"));
    }
    if url.origin.is_inside() && url.origin.host != registry.host {
        return Err(refuse(
            "is an address of this machine or of a private network, and not the registry's own",
        ));
    }
    Ok(url)
}

/// What a token server answers.
#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<u64>,
}

fn fetch_token(agents: &Agents, purpose: Purpose<'_>, key: &TokenKey) -> Result<Token, RegistryError> {
    let (origin, realm, service, scope) = key;
    let url = check_realm(origin, realm)?;
    let credential = agents.config().credentials.get(purpose.host)?;
    let answer = match &credential {
        Some(Credential::RegistryToken(token)) => {
            return Ok(Token { value: token.clone(), renew_at: monotonic() + Duration::from_hours(1) });
        }
        Some(Credential::IdentityToken(secret)) => {
            let answer = refresh(agents, &url, secret, (service, scope))?;
            // Servers without OAuth say so in these ways; they take the token as a password.
            if matches!(answer.status(), 400 | 401 | 404 | 405) {
                let user = Credential::Password { username: "<token>".to_owned(), password: secret.clone() };
                ask_token(agents, &url, Some(&user), (service, scope))?
            } else {
                answer
            }
        }
        other => ask_token(agents, &url, other.as_ref(), (service, scope))?,
    };
    if answer.status() != 200 {
        return Err(refused(answer.into_failure(), purpose, credential.is_some()));
    }
    read_token(answer)
}

/// What a token server's refusal means: without credentials, and where it knows them, it is about rights.
fn refused(failure: Failure, purpose: Purpose<'_>, has_credential: bool) -> RegistryError {
    let host = purpose.host.to_owned();
    let detail = failure.detail();
    let is_about_rights = !purpose.repository.is_empty() && (!has_credential || failure.status == 403);
    match failure.status {
        401 | 403 if is_about_rights => {
            let full = format!("{host}/{}", purpose.repository);
            let familiar = Reference::parse_bare(&full).map(|reference| reference.repository().familiar());
            RegistryError::AccessDenied { repository: familiar.unwrap_or(full), detail, host }
        }
        400 | 401 | 403 => RegistryError::Unauthorized { host, detail },
        _ => failure.into_error(),
    }
}

fn read_token(answer: Answer) -> Result<Token, RegistryError> {
    let host = answer.host();
    let refuse = |reason: &str| RegistryError::Protocol { host: host.clone(), reason: reason.to_owned() };
    let body = answer.into_bytes("the token", http::ERROR_BYTES_MAX)?;
    // The parser's own words could quote the token.
    let parsed: TokenAnswer =
        serde_json::from_slice(&body).map_err(|_cause| refuse("its token answer is not the JSON of one"))?;
    let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
    let value = filled(parsed.token).or_else(|| filled(parsed.access_token));
    let value = value.ok_or_else(|| refuse("its token answer holds no token"))?;
    if value.len() > TOKEN_BYTES_MAX || !value.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(refuse("its token is too long or not text"));
    }
    let seconds = parsed.expires_in.unwrap_or(TOKEN_SECONDS_DEFAULT).max(TOKEN_SECONDS_DEFAULT);
    let life = Duration::from_secs(seconds.min(24 * 3600));
    Ok(Token { value: Redacted::new(value), renew_at: monotonic() + life - TOKEN_MARGIN.min(life / 2) })
}

/// `GET realm?service=…&scope=…`, with user name and password if there are any.
fn ask_token(
    agents: &Agents,
    realm: &Url,
    credential: Option<&Credential>,
    (service, scope): (&str, &str),
) -> Result<Answer, RegistryError> {
    let mut url = realm.clone();
    if !service.is_empty() {
        url.push_query("service", service);
    }
    for scope in scope.split(' ').filter(|scope| !scope.is_empty()) {
        url.push_query("scope", scope);
    }
    if let Some(Credential::Password { username, .. }) = credential {
        url.push_query("account", username);
    }
    let ask = Ask { authorization: credential.and_then(basic), ..Ask::get(Some("application/json")) };
    without_redirect(http::once(agents, &url, &ask)?)
}

/// `POST realm` with an identity token.
fn refresh(
    agents: &Agents,
    realm: &Url,
    secret: &Redacted<String>,
    (service, scope): (&str, &str),
) -> Result<Answer, RegistryError> {
    let fields = [
        ("grant_type", "refresh_token"),
        ("service", service),
        ("client_id", CLIENT_ID),
        ("scope", scope),
        ("refresh_token", secret.reveal()),
    ];
    let form: Vec<String> = fields.iter().map(|(name, value)| format!("{name}={}", escape(value))).collect();
    let form = Some(Redacted::new(form.join("&")));
    let ask = Ask { method: Method::POST, form, ..Ask::get(Some("application/json")) };
    without_redirect(http::once(agents, realm, &ask)?)
}

fn without_redirect(answer: Answer) -> Result<Answer, RegistryError> {
    if (300..400).contains(&answer.status()) {
        return Err(answer.protocol("a token server may not redirect"));
    }
    Ok(answer)
}

/// Reads one `WWW-Authenticate` header; schemes that are not known are left out.
pub(crate) fn parse(header: &str) -> Vec<Challenge> {
    let mut found: Vec<(String, BTreeMap<String, String>)> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            break;
        }
        let Some(value) = after.strip_prefix('=') else {
            found.push((word.to_ascii_lowercase(), BTreeMap::new()));
            rest = after;
            continue;
        };
        let (value, after) = parse_value(value);
        if let Some((_, parameters)) = found.last_mut() {
            parameters.entry(word.to_ascii_lowercase()).or_insert(value);
        }
        rest = after;
    }
    let challenge = |(scheme, mut parameters): (String, BTreeMap<String, String>)| match scheme.as_str() {
        "basic" => Some(Challenge::Basic),
        "bearer" => {
            let mut take = |name: &str| parameters.remove(name).unwrap_or_default();
            Some(Challenge::Bearer { realm: take("realm"), service: take("service"), scope: take("scope") })
        }
        _ => None,
    };
    found.into_iter().filter_map(challenge).collect()
}

/// A quoted string or a token, and what follows it.
fn parse_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        let (value, rest) = text.split_at(end);
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, quoted.get(at + 1..).unwrap_or_default()),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            _ => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: &str, scope: &str) -> Challenge {
        Challenge::Bearer { realm: realm.to_owned(), service: service.to_owned(), scope: scope.to_owned() }
    }

    #[test]
    fn challenges_are_read() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        let expected =
            bearer("https://auth.docker.io/token", "registry.docker.io", "repository:a/b:pull,push");
        assert_eq!(parse(hub), [expected]);
        assert_eq!(parse(r#"Basic realm="x, y=z""#), [Challenge::Basic]);
        assert_eq!(
            parse("Negotiate, basic realm=x, BEARER realm=y"),
            [Challenge::Basic, bearer("y", "", "")]
        );
        assert_eq!(parse(r#"Bearer realm="a\"b" , service = "c""#).len(), 1);
        assert_eq!(parse(r#"Bearer realm="unfinished"#), [bearer("unfinished", "", "")]);
        for odd in ["", ",,,", "=x", "Digest", r#"Bearer ="#] {
            assert!(parse(odd).len() <= 1, "{odd}");
        }
    }

    #[test]
    fn a_realm_is_as_safe_as_its_registry() {
        let ok =
            |registry: &str, realm: &str| check_realm(&Url::parse(registry).unwrap().origin, realm).is_ok();
        assert!(ok("https://r.io", "https://auth.example/token?x=y"));
        assert!(!ok("https://r.io", "http://auth.example/token"), "no step down");
        assert!(ok("http://127.0.0.1:5000", "http://127.0.0.1:5001/token"), "its own host");
        assert!(ok("http://10.0.0.1:5000", "https://auth.example/token"));
        for inside in [
            "https://169.254.169.254/latest",
            "https://127.0.0.1/",
            "https://localhost/",
            "https://10.0.0.1/",
        ] {
            assert!(!ok("https://r.io", inside), "{inside}");
        }
        assert!(!ok("https://r.io", "https://user@auth.example/"));
        assert!(!ok("https://r.io", "/token"));
    }
}
