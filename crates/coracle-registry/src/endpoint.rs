//! Where a repository is asked for: its mirrors first, then the registry itself, and over which scheme.
//!
//! Plain http is spoken with loopback and with registries listed as insecure, and with nobody else. Loopback is
//! asked in plain first (a TLS server refuses that at once, while a plain server may wait for the rest of a TLS
//! greeting), an insecure registry in TLS first. Which scheme works is remembered for the client's life.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use coracle_oci::Repository;
use coracle_oci::reference::DEFAULT_HOST;

use crate::agents::Agents;
use crate::error::RegistryError;
use crate::http::{self, Answer, Ask};
use crate::url::{Origin, Url};

/// The host that serves Docker Hub's registry API.
const HUB_API_HOST: &str = "registry-1.docker.io";

/// One place that has a repository.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    /// Candidates, the preferred scheme first.
    pub origins: Vec<Origin>,
    /// The path before `/v2/`, without a slash at its end.
    pub prefix: String,
    /// For mirrors: the registry that is mirrored, told to them as `ns`.
    pub mirrored: Option<String>,
    /// The host as users and credentials know it.
    pub host: String,
}

impl Endpoint {
    /// The URL of a path below `/v2/`.
    pub(crate) fn url(&self, origin: &Origin, path: &str) -> Url {
        let path = format!("{}/v2/{path}", self.prefix);
        let mut url = Url { origin: origin.clone(), path, query: String::new() };
        if let Some(host) = &self.mirrored {
            url.push_query("ns", host);
        }
        url
    }
}

/// Finds endpoints and remembers schemes.
#[derive(Debug, Default)]
pub(crate) struct Endpoints {
    works: Mutex<BTreeMap<String, Origin>>,
}

impl Endpoints {
    /// The registry itself.
    pub(crate) fn home(&self, agents: &Agents, host: &str) -> Result<Endpoint, RegistryError> {
        let api_host = if host == DEFAULT_HOST { HUB_API_HOST } else { host };
        let setup = || RegistryError::Setup {
            subject: format!("registry {host:?}"),
            reason: "it is not a host with an optional port".to_owned(),
        };
        let https = Origin::parse(true, api_host).ok_or_else(setup)?;
        let http = Origin::parse(false, api_host).ok_or_else(setup)?;
        let remembered = self.works.lock().unwrap_or_else(PoisonError::into_inner).get(host).cloned();
        let origins = match remembered {
            Some(origin) => vec![origin],
            None if https.is_loopback() && agents.cert_dir(&https).is_none() => vec![http, https],
            None if agents.config().is_insecure(&https) => vec![https, http],
            None => vec![https],
        };
        Ok(Endpoint { origins, prefix: String::new(), mirrored: None, host: host.to_owned() })
    }

    /// Mirrors, then the registry itself.
    pub(crate) fn of(
        &self,
        agents: &Agents,
        repository: &Repository,
    ) -> Result<Vec<Endpoint>, RegistryError> {
        let host = repository.host();
        let mut all = Vec::new();
        for mirror in agents.config().mirrors.get(host).into_iter().flatten() {
            let text = if mirror.contains("://") { mirror.clone() } else { format!("https://{mirror}") };
            let setup = |reason: &str| RegistryError::Setup {
                subject: format!("mirror {mirror:?}"),
                reason: reason.to_owned(),
            };
            let url = Url::parse(&text).ok_or_else(|| setup("it is not a URL"))?;
            let plain_is_fine = url.origin.is_loopback() || agents.config().is_insecure(&url.origin);
            if !url.origin.https && !plain_is_fine {
                return Err(setup("plain http is for loopback and for insecure-registries"));
            }
            all.push(Endpoint {
                prefix: url.path.trim_end_matches('/').trim_end_matches("/v2").to_owned(),
                host: url.origin.authority(),
                mirrored: Some(host.to_owned()),
                origins: vec![url.origin],
            });
        }
        all.push(self.home(agents, host)?);
        Ok(all)
    }

    /// Asks one endpoint for a path below `/v2/`, over the first scheme that works.
    ///
    /// `authorization` is called with the origin that is about to be asked.
    pub(crate) fn ask(
        &self,
        agents: &Agents,
        endpoint: &Endpoint,
        path: &str,
        ask: &mut dyn FnMut(&Origin) -> Result<Ask<'static>, RegistryError>,
    ) -> Result<(Origin, Answer), RegistryError> {
        let mut first_failure = None;
        for origin in &endpoint.origins {
            match http::exchange(agents, &endpoint.url(origin, path), &ask(origin)?) {
                // What a TLS server says to somebody who does not speak TLS.
                Ok(answer) if answer.status() == 400 && !origin.https && endpoint.origins.len() > 1 => {
                    first_failure.get_or_insert(answer.into_failure().into_error());
                }
                Ok(answer) => {
                    let mut works = self.works.lock().unwrap_or_else(PoisonError::into_inner);
                    works.entry(endpoint.host.clone()).or_insert_with(|| origin.clone());
                    return Ok((origin.clone(), answer));
                }
                Err(
                    failure @ (RegistryError::Connect { .. }
                    | RegistryError::Tls { .. }
                    | RegistryError::Protocol { .. }),
                ) => {
                    first_failure.get_or_insert(failure);
                }
                Err(other) => return Err(other),
            }
        }
        Err(first_failure.unwrap_or_else(|| RegistryError::Setup {
            subject: format!("registry {}", endpoint.host),
            reason: "it has no address".to_owned(),
        }))
    }
}
