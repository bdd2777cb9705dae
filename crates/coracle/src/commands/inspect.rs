//! `inspect`, of anything or of one kind of thing.

use coracle_docker::{container, image, json, network, nulls, volume};
use coracle_engine::EngineError;
use coracle_gotemplate::{Root, Template, json_html_escaped};
use serde_json::Value;

use super::container::ls;
use crate::cli::flags::{Flag, Parsed, on, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::output;

/// What is inspected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Whatever has the name: container, image, volume, network.
    Any,
    Container,
    Image,
    Volume,
    Network,
}

/// `inspect`.
pub(crate) const ANY: Command = Command {
    path: "inspect",
    aliases: &[],
    operands: "NAME|ID [NAME|ID...]",
    about: "Print all that is known of containers, images, volumes or networks",
    example: "coracle inspect --format '{{.State.ExitCode}}' web",
    flags: &[&[
        text("format", Some('f'), "string", "Print by a Go template, or json"),
        on("size", Some('s'), "Print sizes of containers too"),
        text("type", None, "string", "Look for a container, image, volume or network only"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::AtLeast(1),
    run: |context, parsed| {
        let kind = match parsed.text("type").unwrap_or("") {
            "" => Kind::Any,
            "container" => Kind::Container,
            "image" => Kind::Image,
            "volume" => Kind::Volume,
            "network" => Kind::Network,
            other => {
                return Err(Failure::plain(format!("unknown type: \"{other}\""))
                    .with_hint("the types are container, image, network, volume"));
            }
        };
        run(context, parsed, kind)
    },
};

/// Looks for one name.
struct Finder<'a> {
    context: &'a Context,
    engine: coracle_engine::Engine,
    size: bool,
}

impl Finder<'_> {
    fn container(&self, name: &str) -> Result<Value, Failure> {
        let found = self.engine.find(name)?;
        let sizes = self.size.then(|| ls::sizes(&self.engine, &found));
        Ok(container::inspect(&found.spec, &found.state, &self.context.dirs, sizes))
    }

    fn image(&self, name: &str) -> Result<Value, Failure> {
        let found = self.engine.image(name)?;
        let config: Value = serde_json::from_slice(&found.config)
            .map_err(|e| Failure::plain(format!("cannot read the configuration of image {name}: {e}")))?;
        let names = super::image::Names::of(&found);
        Ok(image::inspect(&names.view(&found), &config, None))
    }

    fn volume(&self, name: &str) -> Result<Value, Failure> {
        let found = self.engine.volume(name).map_err(|e| match e {
            EngineError::NotFound { .. } => Failure::plain(format!("get {name}: no such volume"))
                .with_hint("see what is there with `coracle volume ls`"),
            other => Failure::from(other),
        })?;
        let mountpoint = found.mountpoint.to_string_lossy();
        Ok(volume::inspect(&super::volume::view(&found, &mountpoint)))
    }

    fn network(&self, name: &str) -> Result<Value, Failure> {
        Ok(network::inspect(&super::network::find(self.context, &self.engine, name)?))
    }

    /// Nothing of that name is a reason to look elsewhere; anything else is an answer.
    fn any(&self, name: &str) -> Result<Value, Failure> {
        if name.is_empty() {
            return Err(Failure::plain("invalid container name or ID: value is empty"));
        }
        match self.engine.find(name) {
            Ok(_) => return self.container(name),
            Err(EngineError::NotFound { .. }) => {}
            Err(e) => return Err(e.into()),
        }
        match self.engine.image(name) {
            Ok(_) => return self.image(name),
            Err(EngineError::NotFound { .. } | EngineError::Invalid { .. }) => {}
            Err(e) => return Err(e.into()),
        }
        match self.engine.volume(name) {
            Ok(_) => return self.volume(name),
            Err(EngineError::NotFound { .. } | EngineError::Invalid { .. }) => {}
            Err(e) => return Err(e.into()),
        }
        self.network(name).map_err(|_not_even_that| {
            Failure::plain(format!("No such object: {name}"))
                .with_hint("see what is there with `coracle ps -a`")
        })
    }
}

/// Prints what was found, then says what was not.
pub(crate) fn run(context: &Context, parsed: &Parsed, kind: Kind) -> Outcome {
    let format = parsed.text("format").map(str::trim).filter(|f| !f.is_empty());
    let template = match format {
        None | Some("json") => None,
        Some(format) => Some(parse(&format.replace("\\t", "\t").replace("\\n", "\n"))?),
    };
    let finder = Finder { context, engine: context.engine()?, size: parsed.is_on("size") };
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for name in &parsed.args {
        let result = match kind {
            Kind::Any => finder.any(name),
            Kind::Container => finder.container(name),
            Kind::Image => finder.image(name),
            Kind::Volume => finder.volume(name),
            Kind::Network => finder.network(name),
        };
        match result {
            Ok(value) => found.push(value),
            Err(failure) => missing.push(failure),
        }
    }
    match &template {
        // One line, one list: `jq '.[0]'` reads both forms.
        None if format.is_some() => output::line(&json_html_escaped(&Value::Array(found)))?,
        None => output::line(&json::pretty(&Value::Array(found)))?,
        Some(template) => {
            for value in &found {
                rendered(template, value)?;
            }
            if found.is_empty() {
                output::line("")?;
            }
        }
    }
    for failure in &missing {
        output::report(failure);
    }
    Ok(u8::from(!missing.is_empty()))
}

/// Docker's exit code for a template of `inspect` that cannot be read.
const BAD_TEMPLATE: u8 = 64;

fn parse(format: &str) -> Result<Template, Failure> {
    Template::parse(format).map_err(|e| Failure::new(BAD_TEMPLATE, format!("template parsing error: {e}")))
}

fn rendered(template: &Template, value: &Value) -> Result<(), Failure> {
    let root = Root { null_text: Some(nulls::text), ..Root::map(value) };
    match template.render(&root) {
        Ok(text) => output::line(&text),
        Err(e) => {
            output::line("")?;
            Err(Failure::plain(format!("template parsing error: {e}")))
        }
    }
}
