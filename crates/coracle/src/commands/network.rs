//! Commands about networks. There are three so far: the default bridge, the host's, and none.

use std::collections::BTreeMap;

use coracle_docker::network::{HEADERS, TYPE, View, row};
use coracle_engine::Engine;
use coracle_state::container::NetworkMode;

use super::inspect;
use crate::cli::flags::{Flag, Parsed, list, on, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::filter::Filters;
use crate::table::{self, Row, Shape};

pub(crate) const INSPECT: Command = Command {
    path: "network inspect",
    aliases: &[],
    operands: "NETWORK [NETWORK...]",
    about: "Print all that is known of networks",
    example: "coracle network inspect bridge",
    flags: &[&[
        text("format", Some('f'), "string", "Print by a Go template, or json"),
        on("verbose", Some('v'), "Accepted for Docker's sake"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::AtLeast(1),
    run: |context, parsed| inspect::run(context, parsed, inspect::Kind::Network),
};

pub(crate) const LS: Command = Command {
    path: "network ls",
    aliases: &["network list"],
    operands: "",
    about: "List networks",
    example: "coracle network ls",
    flags: &[&[
        list("filter", Some('f'), "filter", "Conditions: name=, driver=, id="),
        text("format", None, "string", "Print a table, json, or by a Go template"),
        on("no-trunc", None, "Cut nothing"),
        on("quiet", Some('q'), "Print ids only"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::None,
    run: ls,
};

const SHAPE: Shape = Shape { type_name: TYPE, headers: HEADERS, quiet: "ID" };

/// Networks that are no record on disk: their ids are made of their names, and never change.
fn fixed(name: &str, driver: &str) -> View {
    let hex: String = name.bytes().map(|b| format!("{b:02x}")).collect();
    View {
        name: name.to_owned(),
        id: format!("{hex:0<64}"),
        driver: driver.to_owned(),
        subnet: None,
        gateway: None,
        interface: None,
        internal: false,
        containers: Vec::new(),
    }
}

fn all(context: &Context, engine: &Engine) -> Result<Vec<View>, Failure> {
    let mut networks = Vec::new();
    let containers = engine.containers()?;
    let bridge = coracle_net::default_network(&context.dirs).map_err(|e| Failure::of(&e))?;
    let on_bridge = containers.iter().flat_map(|c| {
        let ends = c.state.network.endpoints.iter().filter(|e| e.network == bridge.name);
        ends.map(|e| {
            let address = format!("{}/{}", e.address, e.prefix_len);
            (c.spec.id.to_string(), c.spec.name.clone(), e.mac.clone(), address)
        })
    });
    let of_name =
        View { containers: on_bridge.collect(), id: bridge.id.clone(), ..fixed(&bridge.name, "bridge") };
    // Without being root there is no bridge: each container has a network like all others' to itself.
    networks.push(if context.rootless {
        let (subnet, gateway) = coracle_net::user_network();
        View { driver: "pasta".to_owned(), subnet: Some(subnet), gateway: Some(gateway), ..of_name }
    } else {
        View {
            subnet: Some(bridge.subnet.to_string()),
            gateway: Some(bridge.gateway.to_string()),
            interface: Some(bridge.bridge.clone()),
            internal: bridge.internal,
            ..of_name
        }
    });
    for (name, driver, mode) in [("host", "host", NetworkMode::Host), ("none", "null", NetworkMode::None)] {
        let of_mode = containers.iter().filter(|c| c.is_running() && c.spec.network.mode == mode);
        let users =
            of_mode.map(|c| (c.spec.id.to_string(), c.spec.name.clone(), String::new(), String::new()));
        networks.push(View { containers: users.collect(), ..fixed(name, driver) });
    }
    Ok(networks)
}

/// The network of a name or of an id's beginning.
pub(crate) fn find(context: &Context, engine: &Engine, name: &str) -> Result<View, Failure> {
    let all = all(context, engine)?;
    let by_id = || all.iter().position(|n| !name.is_empty() && n.id.starts_with(name));
    let at = all.iter().position(|n| n.name == name).or_else(by_id);
    at.and_then(|at| all.into_iter().nth(at)).ok_or_else(|| {
        Failure::plain(format!("network {name} not found"))
            .with_hint("see what is there with `coracle network ls`")
    })
}

fn ls(context: &Context, parsed: &Parsed) -> Outcome {
    let filters = Filters::read(parsed, &["dangling", "driver", "id", "label", "name", "scope", "type"])?;
    let dangling = filters.boolean("dangling")?;
    let engine = context.engine()?;
    let rows: Vec<Row> = all(context, &engine)?
        .iter()
        .filter(|n| {
            filters.any("name", |w| n.name.contains(w.as_str()))
                && filters.any("driver", |w| n.driver == *w)
                && filters.any("id", |w| n.id.starts_with(w.as_str()))
                && filters.any("scope", |w| w == "local")
                && filters.any("type", |w| w == "builtin")
                && filters.labels(&BTreeMap::new())
                && dangling.is_none_or(|d| !d)
        })
        .map(|n| Row { fields: row(n, parsed.is_on("no-trunc")), labels: BTreeMap::new() })
        .collect();
    let columns = ["ID", "Name", "Driver", "Scope"];
    table::print(&SHAPE, &columns, &rows, parsed.text("format"), parsed.is_on("quiet"))?;
    Ok(0)
}
